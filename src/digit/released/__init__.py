"""Other people's files, given or fetched, into a pipeline folder."""
