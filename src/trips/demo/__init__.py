"""The page to try a trained model on: ``trips demo``. Needs the extra ``demo`` (gradio).

`models` opens what is shown, `uploads` lets pictures in, `comparison` computes, `markup` writes what it found as HTML,
`page` joins them, `server` serves the page on this machine. Not part of the paper; its sections 3.2 and 5.3 are what
the page shows.
"""

from __future__ import annotations
