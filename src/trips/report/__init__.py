"""One HTML file that tells a training run: what it was, how it went, what came out, and some of what it said.

Not part of the paper. `page` holds the parts of a page and writes it, `charts` draws curves, `pictures` draws photos
with what a selection keeps. Nothing here knows a task or a run's folder: `trips.train.run_report` and
`trips.quickstart.page` gather what is told.
"""
