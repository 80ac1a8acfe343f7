"""Artifacts: a state as a directory with a manifest and digests, for transfer.

artifact.py     export and import
strict_json.py  parses untrusted JSON: manifests, change streams
"""
