"""Images in, crops and tokens out: sources, decoding, the one preprocessing, loaders, the token store.

Nothing is imported here, so that `import digit.data` costs nothing; import from the modules.
"""
