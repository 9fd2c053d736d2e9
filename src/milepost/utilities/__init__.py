"""Names that Lightning users import from here."""
