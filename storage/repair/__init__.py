"""Inspecting and repairing logs, valid or damaged.

verify.py   every invariant, as the format checks it
salvage.py  what is valid in a damaged log, as a new one
"""
