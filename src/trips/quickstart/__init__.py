"""The quick-start: warm up a small model on the embedded corpus, teach it to select in several ways, compare.

`plan` says how much of what, `stages` trains, `evaluation` measures, `report` makes table, figure and sentences,
`page` the page of a run.
"""

from __future__ import annotations

from trips.quickstart.run import run_quickstart

__all__ = ["run_quickstart"]
