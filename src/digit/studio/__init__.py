"""The studio: a page in the browser on which people draw, complete, compare and watch (`digit studio RUN`)."""
