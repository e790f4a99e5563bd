"""Cells and groups: what a sweep computes, and what it resumes from."""
