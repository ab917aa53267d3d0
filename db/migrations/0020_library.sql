-- Keeping: what a user saves from the workspace, what is copied back to it, and the pictures that users send as
-- references. Each row speaks of a file; `fault` is what the reconciler found wrong with it, null where nothing is known.

ALTER TABLE workspace_assets ADD COLUMN source_library_id uuid;  -- the library's item that it is a copy of
ALTER TABLE workspace_assets ADD COLUMN fault text CHECK (fault IN ('missing', 'size'));
-- one live copy of each item; partial, so that what replicas store has no entry
CREATE UNIQUE INDEX workspace_assets_source ON workspace_assets (source_library_id) WHERE source_library_id IS NOT NULL;

ALTER TABLE user_library ADD COLUMN source_job_id uuid;          -- no foreign key: it outlives the job
ALTER TABLE user_library ADD COLUMN fault text CHECK (fault IN ('missing', 'size'));
-- whether any row speaks of a file, asked by the file
CREATE INDEX user_library_file ON user_library (storage_path);
CREATE INDEX user_library_thumbnail ON user_library (thumbnail_path) WHERE thumbnail_path IS NOT NULL;

CREATE TABLE reference_uploads (
  id uuid PRIMARY KEY,
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  storage_path text NOT NULL UNIQUE,          -- key in bucket reference_images
  mime_type text NOT NULL,
  file_size_bytes bigint NOT NULL CHECK (file_size_bytes > 0),
  width int NOT NULL CHECK (width > 0),
  height int NOT NULL CHECK (height > 0),
  sha256 bytea NOT NULL CHECK (length(sha256) = 32),  -- of what was sent: sending it again is the same upload
  fault text CHECK (fault IN ('missing', 'size')),
  created_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (user_id, sha256)
);

ALTER TABLE reference_uploads ENABLE ROW LEVEL SECURITY;
GRANT SELECT ON reference_uploads TO authenticated;
CREATE POLICY own_or_staff ON reference_uploads FOR SELECT TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));

-- Of these files of a bucket, those that a row speaks of. Runs as the owner, for the sweep: its role reads no library.
CREATE FUNCTION ourvidz.kept_files(bucket text, keys text[]) RETURNS SETOF text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT g.key FROM unnest(keys) AS g(key)
  WHERE (bucket = 'user-library' AND (EXISTS (SELECT FROM user_library l WHERE l.storage_path = g.key)
                                      OR EXISTS (SELECT FROM user_library l WHERE l.thumbnail_path = g.key)))
     OR (bucket = 'reference_images' AND EXISTS (SELECT FROM reference_uploads u WHERE u.storage_path = g.key))
$$;
REVOKE EXECUTE ON FUNCTION ourvidz.kept_files(text, text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.kept_files(text, text[]) TO ourvidz_worker;
