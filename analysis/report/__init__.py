"""Statistics -> figures with captions -> one page: `plots` draws, this says what is drawn and what to look for."""
