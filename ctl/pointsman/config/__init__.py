"""Configuration files: what they may say, what that means for `up`, and seeing them change.

`files.read` is bytes in, a `Configuration` out; `watch` sees a new file; `reload` says what of new
settings is applied while the agent runs.
"""
