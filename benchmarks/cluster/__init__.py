"""The whole system beside a bare loop over the same engine, and beside other servers of the same pipeline."""
