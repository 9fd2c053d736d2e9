"""Milepost's storage for those who call other libraries."""
