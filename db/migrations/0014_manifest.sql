-- What each file was made from and by: enough to make it again, or to say why it would be another one. Null where an
-- outside provider made it, or a version before this one. Who may read the row may read it.

ALTER TABLE workspace_assets ADD COLUMN manifest jsonb CHECK (jsonb_typeof(manifest) = 'object');
