"""Images to crops and tokens: sources, decoding, the one preprocessing, loaders, the token store.

Import from the modules; this package imports none of them, which keeps `import digit.data` fast.
"""
