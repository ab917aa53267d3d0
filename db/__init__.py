"""What is durable: rows in Postgres and blobs in an object store. Knows nothing of Ray, torch or HTTP servers."""
