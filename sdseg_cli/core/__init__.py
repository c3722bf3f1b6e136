"""Everything sdseg does, free of any terminal."""
