"""Trainers and their configurations, one pair of files a method."""
