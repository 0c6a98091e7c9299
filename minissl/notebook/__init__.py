"""Helpers of the course notebooks: exercises, widgets, the collapse lab and the course's table of results."""
