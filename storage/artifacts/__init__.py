"""Artifacts: a state as a directory with a manifest and digests, for transfer.

artifact.py     export and import
staging.py      a directory under construction that gets its name in one step
strict_json.py  parses untrusted JSON: manifests, change streams
"""
