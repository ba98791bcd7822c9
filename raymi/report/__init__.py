"""Polars over the store: tables, without torch or Ray."""
