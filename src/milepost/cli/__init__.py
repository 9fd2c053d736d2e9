"""The command line. Listing, showing, verifying and comparing import no torch."""
