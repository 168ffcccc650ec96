"""Locating any number of photos: a stream from photo sets to results, and jobs that can be interrupted."""
