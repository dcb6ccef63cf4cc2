"""Recognisers: one file a concept, each from any model's spelling to one small canonical form.

They walk up from a node, look through views, casts, clones and no-op slices, and raise `Declined` with the node and
the failed check, or return None where there is nothing of the kind. They never change the graph.
"""
