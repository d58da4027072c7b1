# SPDX-License-Identifier: Apache-2.0
"""The page that people read says what the code does."""

from pathlib import Path

from nearkv_hw import abi, abi_doc

PAGE = Path(__file__).parents[2] / "hw" / "ABI.md"


def test_abi_page_is_up_to_date():
    assert PAGE.read_text() == abi_doc.page(), "run: make abi-page"


def test_every_field_and_register_is_on_the_page():
    text = PAGE.read_text()
    records = (abi.JOB, abi.PAGE_ENTRY, abi.Q_RECORD, abi.PARTIAL_HEADER, abi.SUMMARY)
    names = [field.name for record in records for field in record.fields]
    for name in [*names, *(r.name for r in abi.REGISTERS), *(flag.name for flag in abi.Status)]:
        assert f"`{name}`" in text
