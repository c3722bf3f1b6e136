"""Draws files (pictures, tables, pages), never the screen."""
