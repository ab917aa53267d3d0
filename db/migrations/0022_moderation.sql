-- Moderation: whether what was made may be shown to others. Owners see their own results whatever the status says, and
-- moderators and admins see all; what is published is what these tables and `system_config` together let through.

ALTER TABLE workspace_assets
  ADD COLUMN moderation_status text NOT NULL DEFAULT 'pending'
    CHECK (moderation_status IN ('pending', 'approved', 'rejected', 'flagged')),
  ADD COLUMN moderation_reason text CHECK (moderation_reason ~ '^[a-z0-9][a-z0-9_.:-]{0,99}$');
ALTER TABLE user_library
  ADD COLUMN moderation_status text NOT NULL DEFAULT 'pending'
    CHECK (moderation_status IN ('pending', 'approved', 'rejected', 'flagged')),
  ADD COLUMN moderation_reason text CHECK (moderation_reason ~ '^[a-z0-9][a-z0-9_.:-]{0,99}$');
CREATE INDEX workspace_assets_moderation ON workspace_assets (moderation_status, created_at, id);
CREATE INDEX user_library_moderation ON user_library (moderation_status, created_at, id);
CREATE INDEX user_library_published ON user_library (created_at DESC, id DESC) WHERE visibility = 'public';

-- Every decision of a person, for those who decide.
CREATE TABLE moderation_reviews (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  asset_id uuid NOT NULL,                     -- no foreign key: it outlives the asset
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,  -- the owner
  job_id uuid,
  reviewer uuid REFERENCES profiles ON DELETE SET NULL,
  was text NOT NULL CHECK (was IN ('pending', 'approved', 'rejected', 'flagged')),
  status text NOT NULL CHECK (status IN ('pending', 'approved', 'rejected', 'flagged')),
  reason text CHECK (reason ~ '^[a-z0-9][a-z0-9_.:-]{0,99}$'),
  notes text CHECK (length(notes) <= 2000),
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX moderation_reviews_asset ON moderation_reviews (asset_id, created_at);
CREATE INDEX moderation_reviews_user ON moderation_reviews (user_id);
ALTER TABLE moderation_reviews ENABLE ROW LEVEL SECURITY;
GRANT SELECT ON moderation_reviews TO authenticated;
CREATE POLICY staff ON moderation_reviews FOR SELECT TO authenticated USING ((SELECT ourvidz.reads_all()));

-- off: what nobody has looked at may be published; publish: it waits for a review; all: every result does. What it is
-- unless an admin sets it. Runs as the owner, as users do not read the settings.
CREATE FUNCTION ourvidz.moderation_mode() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT coalesce((SELECT config ->> 'moderation' FROM system_config
                   WHERE config ->> 'moderation' IN ('off', 'publish', 'all')), 'publish')
$$;

-- A reason on a pending result is that of a classifier that could not judge it; no setting makes that an approval.
CREATE FUNCTION ourvidz.publishable(status text, reason text) RETURNS boolean
LANGUAGE sql STABLE AS $$
  SELECT status = 'approved' OR (status = 'pending' AND reason IS NULL AND ourvidz.moderation_mode() = 'off')
$$;

-- What others may see of what is kept, without the words that it was made from; nsfw is for the age-verified.
CREATE VIEW ourvidz.published AS
SELECT l.id, l.asset_type, l.storage_path, l.thumbnail_path, l.mime_type, l.file_size_bytes, l.width, l.height,
       l.duration_seconds, l.custom_title AS title, l.tags, l.model_used, m.content_mode, l.visibility, l.created_at
FROM user_library l,
     LATERAL (SELECT CASE WHEN 'nsfw' IN (l.content_category, coalesce(l.generation_metadata ->> 'content_mode', 'sfw'))
                          THEN 'nsfw' ELSE 'sfw' END AS content_mode) m
WHERE l.visibility <> 'private' AND l.fault IS NULL
  AND ourvidz.publishable(l.moderation_status, l.moderation_reason)
  AND (m.content_mode = 'sfw' OR (SELECT ourvidz.is_adult()));
REVOKE ALL ON ourvidz.published FROM PUBLIC;

-- Not with the caller's rights: its own conditions take the place of the policy on the library's rows.
CREATE VIEW published_items AS SELECT * FROM ourvidz.published WHERE visibility = 'public';
GRANT SELECT ON published_items TO authenticated;

-- One of them, by its id: unlisted items are for those who know it.
CREATE FUNCTION ourvidz.published_item(wanted uuid) RETURNS SETOF ourvidz.published
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT * FROM ourvidz.published WHERE id = wanted
$$;
REVOKE EXECUTE ON FUNCTION ourvidz.published_item(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.published_item(uuid) TO authenticated;

-- A copy has the status of what it is a copy of. The lock makes a review that is under way come before or after.
CREATE FUNCTION ourvidz.inherit_moderation() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE source record;
BEGIN
  IF TG_TABLE_NAME = 'user_library' THEN
    SELECT moderation_status, moderation_reason INTO source
    FROM workspace_assets WHERE id = NEW.source_asset_id AND user_id = NEW.user_id FOR SHARE;
  ELSE
    SELECT moderation_status, moderation_reason INTO source
    FROM user_library WHERE id = NEW.source_library_id AND user_id = NEW.user_id FOR SHARE;
  END IF;
  IF FOUND THEN
    NEW.moderation_status := source.moderation_status;
    NEW.moderation_reason := source.moderation_reason;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER user_library_moderated BEFORE INSERT ON user_library
  FOR EACH ROW WHEN (NEW.source_asset_id IS NOT NULL) EXECUTE FUNCTION ourvidz.inherit_moderation();
CREATE TRIGGER workspace_assets_moderated BEFORE INSERT ON workspace_assets
  FOR EACH ROW WHEN (NEW.source_library_id IS NOT NULL) EXECUTE FUNCTION ourvidz.inherit_moderation();

-- A job has the gravest status of what it made, wherever that lies now.
CREATE FUNCTION ourvidz.job_follows_moderation() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE made_by uuid; gravest text;
BEGIN
  IF TG_TABLE_NAME = 'user_library' THEN
    made_by := NEW.source_job_id;
  ELSE
    made_by := NEW.job_id;
  END IF;
  SELECT CASE WHEN bool_or(status = 'rejected') THEN 'rejected' WHEN bool_or(status = 'flagged') THEN 'flagged'
              WHEN bool_or(status = 'pending') THEN 'pending' ELSE 'approved' END INTO gravest
  FROM (SELECT moderation_status AS status FROM workspace_assets WHERE job_id = made_by
        UNION ALL
        SELECT moderation_status FROM user_library WHERE user_id = NEW.user_id AND source_job_id = made_by) results;
  UPDATE jobs SET moderation_status = gravest WHERE id = made_by AND moderation_status <> gravest;
  RETURN NULL;
END $$;
CREATE TRIGGER workspace_assets_judged AFTER INSERT ON workspace_assets
  FOR EACH ROW WHEN (NEW.moderation_status <> 'pending') EXECUTE FUNCTION ourvidz.job_follows_moderation();
CREATE TRIGGER workspace_assets_reviewed AFTER UPDATE OF moderation_status ON workspace_assets
  FOR EACH ROW WHEN (OLD.moderation_status <> NEW.moderation_status) EXECUTE FUNCTION ourvidz.job_follows_moderation();
CREATE TRIGGER user_library_reviewed AFTER UPDATE OF moderation_status ON user_library
  FOR EACH ROW WHEN (OLD.moderation_status <> NEW.moderation_status AND NEW.source_job_id IS NOT NULL)
  EXECUTE FUNCTION ourvidz.job_follows_moderation();

-- Decide about a result: an asset of the workspace, an item of the library, and every copy of it among both. `expected`
-- is the status that the reviewer saw, null for any. Answers the status that it had, and whether it was changed; no row
-- when there is no such result. For the owner of the tables only.
CREATE FUNCTION ourvidz.moderate(
  wanted uuid, verdict text, why text, remarks text, moderator uuid, expected text,
  OUT was text, OUT done boolean
) RETURNS SETOF record
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE items uuid[]; assets uuid[]; found_job uuid; found_owner uuid;
BEGIN
  -- items before assets, which is the order of whoever clears; then items again: a save that was under way held the asset
  items := ARRAY(SELECT id FROM user_library WHERE id = wanted OR source_asset_id = wanted
                   OR id = (SELECT source_library_id FROM workspace_assets WHERE id = wanted) ORDER BY id FOR UPDATE);
  assets := ARRAY(SELECT id FROM workspace_assets WHERE id = wanted OR source_library_id = ANY (items)
                    OR id = ANY (ARRAY(SELECT source_asset_id FROM user_library WHERE id = ANY (items)))
                  ORDER BY id FOR UPDATE);
  items := ARRAY(SELECT id FROM user_library WHERE id = ANY (items) OR id = wanted OR source_asset_id = ANY (assets)
                 ORDER BY id FOR UPDATE);
  SELECT r.status, r.job, r.owner INTO was, found_job, found_owner FROM (
    SELECT moderation_status AS status, job_id AS job, user_id AS owner FROM workspace_assets WHERE id = wanted
    UNION ALL
    SELECT moderation_status, source_job_id, user_id FROM user_library WHERE id = wanted) r;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  done := expected IS NULL OR was = expected;
  IF done THEN
    UPDATE user_library SET moderation_status = verdict, moderation_reason = why WHERE id = ANY (items);
    UPDATE workspace_assets SET moderation_status = verdict, moderation_reason = why WHERE id = ANY (assets);
    UPDATE jobs SET reviewed_at = now(), reviewed_by = moderator, review_notes = remarks
    WHERE id = ANY (ARRAY(SELECT job_id FROM workspace_assets WHERE id = ANY (assets)
                          UNION SELECT source_job_id FROM user_library WHERE id = ANY (items)));
    INSERT INTO moderation_reviews (asset_id, user_id, job_id, reviewer, was, status, reason, notes)
    VALUES (wanted, found_owner, found_job, moderator, was, verdict, why, remarks);
    INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
    VALUES (moderator, 'asset.' || verdict, 'asset', wanted::text,
            jsonb_strip_nulls(jsonb_build_object('was', was, 'reason', why, 'job_id', found_job)));
  END IF;
  RETURN NEXT;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.moderate(uuid, text, text, text, uuid, text) FROM PUBLIC;
