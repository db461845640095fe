"""Training: optimizer, schedules, the one loop on accelerate, typed recipes.

Names are imported from their modules; nothing is loaded here, so that the command line starts quickly.
"""
