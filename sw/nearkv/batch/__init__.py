# SPDX-License-Identifier: Apache-2.0
"""`nearkv batch IN OUT`: answers a file of prompts in the OpenAI batch format, and can be killed at any moment.

requests.py   lines of the input, and of the results
results.py    the result file, which is its own journal
prefixes.py   which prompts begin alike
engine.py     many prompts with one model and one cache
sampling.py   the next token of one answer
memory.py     how many prompts at once
command.py    the command
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
