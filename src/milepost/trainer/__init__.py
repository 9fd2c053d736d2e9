"""The trainer: what runs, in which order, and what is saved of it."""
