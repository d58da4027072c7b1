# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a card."""

from nearkv_hw.abi import Status

from ..io import PageId


class CardError(RuntimeError):
    """A card could not be opened, did not answer in time, or refused a job.

    Attributes
    ----------
    status : Status or None
        Of the partial that is not good.
    counters : dict or None
        Fields of the summary (`abi.SUMMARY`), if the run came to its end.
    page : PageId or None
        What the error is about, if it is about one sequence.
    filename : str or None
        Of that page.
    recoverable : bool
        Whether `Card.reset` is likely to help.
    """

    def __init__(
        self,
        message: str,
        *,
        status: Status | None = None,
        counters: dict | None = None,
        page: PageId | None = None,
        filename: str | None = None,
        recoverable: bool = False,
    ):
        super().__init__(message)
        self.status, self.counters = status, counters
        self.page, self.filename, self.recoverable = page, filename, recoverable
