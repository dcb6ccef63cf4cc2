"""From canonical forms to fi ops: which grade a site reaches, and the calls put in its place."""
