"""Artifacts: a state as a directory with a manifest and digests, to be sent elsewhere.

artifact.py     export and import
strict_json.py  JSON from outside: manifests, change streams
"""
