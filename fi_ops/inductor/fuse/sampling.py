def rewrite_samplers(graph, emitter, report): pass
