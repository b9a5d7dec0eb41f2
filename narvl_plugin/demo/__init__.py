"""The page of `narvl demo`: a model answers about images in a browser, with its queries and where it looked."""
