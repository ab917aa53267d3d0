-- Results that are to be somewhere beside the workspace: the picture of a scene, a character's portrait or avatar. What a
-- job says of it in its metadata is taken down in the transaction that completes it, and carried out by upkeep.

CREATE TABLE job_destinations (
  job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
  kind text NOT NULL CHECK (kind IN ('roleplay_scene', 'character_portrait', 'character_avatar')),
  state text NOT NULL DEFAULT 'due' CHECK (state IN ('due', 'placed', 'refused')),
  path text,                                  -- where the picture lies, its bucket first
  reason text,                                -- why it was not placed
  created_at timestamptz NOT NULL DEFAULT now(),
  settled_at timestamptz,
  CONSTRAINT settled_has_time CHECK ((state = 'due') = (settled_at IS NULL)),
  CONSTRAINT placed_has_path CHECK ((state = 'placed') = (path IS NOT NULL)),
  CONSTRAINT refused_has_reason CHECK ((state = 'refused') = (reason IS NOT NULL))
);
CREATE INDEX job_destinations_due ON job_destinations (created_at) WHERE state = 'due';
ALTER TABLE job_destinations ENABLE ROW LEVEL SECURITY;
GRANT SELECT, UPDATE (state, reason, settled_at) ON job_destinations TO ourvidz_worker;
CREATE POLICY worker ON job_destinations TO ourvidz_worker USING (true) WITH CHECK (true);

-- A definer: whoever completes a job may not write here otherwise.
CREATE FUNCTION ourvidz.keep_destination() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO job_destinations (job_id, kind) VALUES (NEW.id, NEW.metadata ->> 'destination') ON CONFLICT DO NOTHING;
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.keep_destination() FROM PUBLIC;
CREATE TRIGGER jobs_destination AFTER UPDATE OF status ON jobs FOR EACH ROW
  WHEN (NEW.status = 'completed' AND OLD.status <> 'completed'
        AND NEW.metadata ->> 'destination' IN ('roleplay_scene', 'character_portrait', 'character_avatar'))
  EXECUTE FUNCTION ourvidz.keep_destination();

-- A text of metadata as an id; null where it is none.
CREATE FUNCTION ourvidz.id_of(given text) RETURNS uuid
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN given ~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' THEN given::uuid END
$$;

-- The scene or the character that a job's metadata names, where the job's user may change it; null otherwise. A scene is
-- changed by the owner of its character or of its conversation; an avatar is an admin's to give.
CREATE FUNCTION ourvidz.destination_target(of_user uuid, metadata jsonb) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT CASE metadata ->> 'destination'
    WHEN 'roleplay_scene' THEN (
      SELECT s.id FROM character_scenes s
      LEFT JOIN characters c ON c.id = s.character_id LEFT JOIN conversations t ON t.id = s.conversation_id
      WHERE CASE WHEN metadata ->> 'scene_id' IS NOT NULL THEN s.id = ourvidz.id_of(metadata ->> 'scene_id')
                 ELSE s.character_id = ourvidz.id_of(metadata ->> 'character_id')
                      AND s.conversation_id = ourvidz.id_of(metadata ->> 'conversation_id') END
        AND (c.user_id = of_user OR t.user_id = of_user OR has_role(of_user, 'admin'))
      ORDER BY s.created_at DESC, s.id DESC LIMIT 1)
    WHEN 'character_portrait' THEN (
      SELECT id FROM characters WHERE id = ourvidz.id_of(metadata ->> 'character_id')
        AND (user_id = of_user OR has_role(of_user, 'admin')))
    WHEN 'character_avatar' THEN (
      SELECT id FROM characters WHERE id = ourvidz.id_of(metadata ->> 'character_id') AND has_role(of_user, 'admin'))
  END
$$;

-- Let the scene or character speak of the picture of a completed job, whose copy lies in the store already under `key`: of
-- `user-library`, or of `avatars`. In the library it is an item like a saved one; an asset that was saved before keeps the
-- file it has, which is then the answer. The path with its bucket; null where there is nothing to change any more.
CREATE FUNCTION ourvidz.place_result(asked uuid, key text, thumbnail text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
  due job_destinations;
  job jobs;
  asset workspace_assets;
  target uuid;
  placed text;
BEGIN
  SELECT * INTO due FROM job_destinations WHERE job_id = asked FOR UPDATE;
  IF due.state IS DISTINCT FROM 'due' THEN
    RETURN due.path;
  END IF;
  SELECT * INTO job FROM jobs WHERE id = asked;
  SELECT * INTO asset FROM workspace_assets WHERE job_id = asked ORDER BY asset_index LIMIT 1;
  target := ourvidz.destination_target(job.user_id, job.metadata);
  IF target IS NULL OR asset.id IS NULL THEN
    UPDATE job_destinations SET state = 'refused', settled_at = now(),
      reason = CASE WHEN target IS NULL THEN 'destination_not_found' ELSE 'asset_not_found' END WHERE job_id = asked;
    RETURN NULL;
  END IF;

  IF due.kind = 'character_avatar' THEN
    placed := 'avatars/' || key;
    UPDATE characters SET image_url = placed WHERE id = target;
  ELSE
    INSERT INTO user_library AS l (user_id, source_asset_id, source_job_id, asset_type, storage_path, thumbnail_path,
                                   file_size_bytes, mime_type, width, height, original_prompt, model_used, generation_seed,
                                   tags, content_category, roleplay_metadata, generation_metadata)
    VALUES (asset.user_id, asset.id, asset.job_id, asset.asset_type, key, thumbnail, asset.file_size_bytes, asset.mime_type,
            asset.width, asset.height, asset.original_prompt, asset.model_used, asset.generation_seed,
            ARRAY['character', CASE due.kind WHEN 'character_portrait' THEN 'portrait' ELSE 'scene' END], 'character',
            jsonb_strip_nulls(jsonb_build_object('character_id', job.metadata -> 'character_id',
              'conversation_id', job.metadata -> 'conversation_id', 'scene_id', job.metadata -> 'scene_id')),
            jsonb_build_object('job_id', job.id, 'job_type', job.job_type, 'quality', job.quality,
              'model_type', job.model_type, 'content_mode', job.content_mode, 'asset_index', asset.asset_index,
              'settings', asset.generation_settings, 'manifest', asset.manifest))
    ON CONFLICT (source_asset_id) DO UPDATE
      SET tags = ARRAY(SELECT DISTINCT unnest(l.tags || excluded.tags) ORDER BY 1)
    RETURNING 'user-library/' || l.storage_path INTO placed;
    IF due.kind = 'character_portrait' THEN
      UPDATE characters SET image_url = placed, reference_image_url = placed, seed_locked = asset.generation_seed
      WHERE id = target;
    ELSE
      UPDATE conversations c SET last_scene_image = placed
      FROM character_scenes s WHERE s.id = target AND c.id = s.conversation_id AND c.user_id = job.user_id;
      UPDATE character_scenes SET image_url = placed, job_id = asked WHERE id = target;
    END IF;
  END IF;
  UPDATE job_destinations SET state = 'placed', path = placed, settled_at = now() WHERE job_id = asked;
  RETURN placed;
END $$;

REVOKE EXECUTE ON FUNCTION ourvidz.destination_target(uuid, jsonb), ourvidz.place_result(uuid, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.destination_target(uuid, jsonb), ourvidz.place_result(uuid, text, text) TO ourvidz_worker;

-- A scene stands in a conversation of whoever makes it.
CREATE FUNCTION ourvidz.owns_conversation(asked uuid) RETURNS boolean
LANGUAGE sql STABLE AS $$ SELECT EXISTS (SELECT FROM public.conversations WHERE id = asked AND user_id = ourvidz.uid()) $$;
ALTER POLICY own_or_admin ON character_scenes
  USING (ourvidz.owns_character(character_id) OR (SELECT has_role(ourvidz.uid(), 'admin')))
  WITH CHECK (ourvidz.owns_character(character_id)
                AND (conversation_id IS NULL OR ourvidz.owns_conversation(conversation_id))
              OR (SELECT has_role(ourvidz.uid(), 'admin')));
