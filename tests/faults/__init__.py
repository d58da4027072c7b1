# SPDX-License-Identifier: Apache-2.0
"""The fault campaign (`tests/faults.py`): what it needs to break a store and to judge the outcome.

world.py      operations, the truth beside the store, and the comparison of the two
system.py     what stands between the store and the operating system: kills, errors, lost power
damage.py     kinds of trials that damage the files of a closed store
accidents.py  kinds of trials that disturb a store at work
sabotage.py   stores that are broken on purpose, to see that the campaign notices
"""
