"""The hook protocols that Module and DataModule share."""
