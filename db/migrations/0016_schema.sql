-- The rest of the specification's tables: what users make beside jobs, and what admins configure and test. Users and
-- admins write them under row-level security, so that a client which speaks REST to the database can. Kinds are text
-- with a CHECK, as everywhere: a kind can be added in the transaction that needs it, which an enum can't.

-- ------------------------------------------------------------------------------------------------- whose rights

-- Admins, and whoever acts with no role taken on, which is the owner.
CREATE FUNCTION ourvidz.administers() RETURNS boolean
LANGUAGE sql STABLE AS $$
  SELECT current_setting('role') IN ('none', 'service_role') OR has_role(ourvidz.uid(), 'admin')
$$;

-- Whether the caller may see what is not for children. A definer: it is asked about the caller alone.
CREATE FUNCTION ourvidz.is_adult() RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT coalesce((SELECT age_verified FROM profiles WHERE id = ourvidz.uid()), false)
$$;

CREATE FUNCTION get_user_role_priority(_user_id uuid) RETURNS int
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT coalesce(max(CASE role WHEN 'admin' THEN 100 WHEN 'moderator' THEN 80 WHEN 'premium_user' THEN 60
                                WHEN 'basic_user' THEN 40 WHEN 'guest' THEN 20 END), 0)
  FROM user_roles WHERE user_id = _user_id
$$;

CREATE FUNCTION verify_user_age(user_birth_date date) RETURNS boolean
LANGUAGE sql STABLE AS $$
  SELECT coalesce(user_birth_date <= current_date - interval '18 years' AND user_birth_date > '1900-01-01', false)
$$;

-- A birth date decides the age gate whenever it is written. Erasing it decides nothing.
CREATE FUNCTION ourvidz.check_age() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  NEW.age_verified := verify_user_age(NEW.birth_date);
  NEW.age_verification_date := CASE WHEN NEW.age_verified THEN now() END;
  RETURN NEW;
END $$;
CREATE TRIGGER profiles_age BEFORE UPDATE OF birth_date ON profiles FOR EACH ROW
  WHEN (NEW.birth_date IS NOT NULL AND NEW.birth_date IS DISTINCT FROM OLD.birth_date)
  EXECUTE FUNCTION ourvidz.check_age();

-- What anybody may know of a user.
CREATE FUNCTION get_safe_profile_view(profile_id uuid) RETURNS json
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
  SELECT json_build_object('id', id, 'username', username, 'created_at', created_at) FROM profiles WHERE id = profile_id
$$;

CREATE FUNCTION is_url_expired(expires_at timestamptz) RETURNS boolean
LANGUAGE sql STABLE AS $$ SELECT expires_at IS NULL OR expires_at <= now() $$;

CREATE FUNCTION check_valid_tasks(arr text[]) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT arr <@ '{t2i,i2i,i2i_multi,t2v,i2v,extend,multi,upscale,roleplay,reasoning,enhancement,embedding,vision}'::text[]
$$;

-- An entry of the audit log: in one's own name, or as an admin in anybody's.
CREATE FUNCTION log_user_activity(
  p_user_id uuid, p_action text, p_resource_type text DEFAULT NULL, p_resource_id text DEFAULT NULL,
  p_metadata jsonb DEFAULT '{}', p_ip_address inet DEFAULT NULL, p_user_agent text DEFAULT NULL) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE entry uuid;
BEGIN
  IF NOT (p_user_id IS NOT DISTINCT FROM ourvidz.uid() OR ourvidz.administers()) THEN
    RAISE insufficient_privilege USING MESSAGE = 'the log of somebody else';
  END IF;
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata, ip_address, user_agent)
  VALUES (p_user_id, p_action, p_resource_type, p_resource_id, coalesce(p_metadata, '{}'), p_ip_address, p_user_agent)
  RETURNING id INTO entry;
  RETURN entry;
END $$;

-- Every act of an admin on what all users depend on, told in the log: which row, and which columns, never what they
-- hold. What the API and the seeding write comes under no claims, and tells of itself.
CREATE FUNCTION ourvidz.audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
  before jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) ELSE '{}' END;
  after jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) ELSE '{}' END;
BEGIN
  IF ourvidz.uid() IS NOT NULL THEN
    INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
    VALUES (ourvidz.uid(), TG_TABLE_NAME || '.' || lower(TG_OP), TG_TABLE_NAME,
            coalesce(after ->> 'id', before ->> 'id'),
            jsonb_build_object('columns', (
              SELECT coalesce(jsonb_agg(key ORDER BY key), '[]')
              FROM (SELECT jsonb_object_keys(before || after) AS key) keys
              WHERE before -> key IS DISTINCT FROM after -> key AND key <> 'updated_at')));
  END IF;
  RETURN NULL;
END $$;

-- Sign-up on a database with users of its own, as Supabase is: without profile and role there is no user of ours, so a
-- failure here fails the sign-up rather than hide.
CREATE FUNCTION ourvidz.new_user() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO profiles (id) VALUES (NEW.id) ON CONFLICT (id) DO NOTHING;
  INSERT INTO user_roles (user_id, role) VALUES (NEW.id, 'basic_user') ON CONFLICT (user_id, role) DO NOTHING;
  RETURN NULL;
END $$;
DO $$
BEGIN
  IF to_regclass('auth.users') IS NOT NULL THEN
    CREATE TRIGGER ourvidz_new_user AFTER INSERT ON auth.users FOR EACH ROW EXECUTE FUNCTION ourvidz.new_user();
  END IF;
END $$;

REVOKE EXECUTE ON FUNCTION ourvidz.is_adult(), get_user_role_priority(uuid), get_safe_profile_view(uuid),
  log_user_activity(uuid, text, text, text, jsonb, inet, text), ourvidz.audit_change(), ourvidz.new_user() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.is_adult(), get_user_role_priority(uuid), get_safe_profile_view(uuid),
  log_user_activity(uuid, text, text, text, jsonb, inet, text) TO authenticated;

-- ----------------------------------------------------------------------------------------------- what users make

CREATE TABLE projects (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  title text,
  original_prompt text NOT NULL,
  enhanced_prompt text,
  media_type text NOT NULL CHECK (media_type IN ('image', 'video')),
  duration int NOT NULL DEFAULT 0 CHECK (duration >= 0),
  scene_count int NOT NULL DEFAULT 1 CHECK (scene_count >= 0),
  workflow_step text NOT NULL DEFAULT 'configuration' CHECK (workflow_step IN (
    'configuration', 'character_selection', 'story_breakdown', 'storyboard_generation', 'video_generation', 'completed')),
  character_id uuid,
  preview_url text,
  reference_image_url text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX projects_user ON projects (user_id, created_at DESC);
CREATE INDEX projects_character ON projects (character_id) WHERE character_id IS NOT NULL;

CREATE TABLE characters (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid REFERENCES profiles ON DELETE CASCADE,  -- null: the installation's own
  creator_id uuid REFERENCES profiles ON DELETE SET NULL,
  name text NOT NULL CHECK (name <> ''),
  description text NOT NULL,
  traits text,
  appearance_tags text[] NOT NULL DEFAULT '{}',
  image_url text,
  persona text,
  system_prompt text,
  voice_tone text,
  mood text,
  likes_count int NOT NULL DEFAULT 0 CHECK (likes_count >= 0),
  interaction_count int NOT NULL DEFAULT 0 CHECK (interaction_count >= 0),
  reference_image_url text,
  is_public boolean NOT NULL DEFAULT false,   -- the original's true published what nobody had asked to publish
  gender text NOT NULL DEFAULT 'unspecified' CHECK (gender IN ('male', 'female', 'non-binary', 'unspecified')),
  content_rating varchar(10) NOT NULL DEFAULT 'sfw' CHECK (content_rating IN ('sfw', 'nsfw')),
  role text NOT NULL DEFAULT 'ai' CHECK (role IN ('ai', 'user', 'narrator')),
  consistency_method text NOT NULL DEFAULT 'i2i_reference',
  seed_locked bigint CHECK (seed_locked >= 0),  -- a seed may be larger than an int
  base_prompt text,
  preview_image_url text,
  quick_start boolean NOT NULL DEFAULT false,
  voice_examples text[] NOT NULL DEFAULT '{}',
  scene_behavior_rules jsonb NOT NULL DEFAULT '{}',
  forbidden_phrases text[] NOT NULL DEFAULT '{}',
  first_message text,
  alternate_greetings jsonb NOT NULL DEFAULT '[]',
  default_presets jsonb NOT NULL DEFAULT '{}',
  portrait_count int NOT NULL DEFAULT 0 CHECK (portrait_count >= 0),
  scene_count int NOT NULL DEFAULT 0 CHECK (scene_count >= 0),
  style_preset text NOT NULL DEFAULT 'realistic',
  locked_traits text[] NOT NULL DEFAULT '{}',
  media_defaults jsonb NOT NULL DEFAULT '{}',
  personality_traits jsonb NOT NULL DEFAULT '{}',
  physical_traits jsonb NOT NULL DEFAULT '{}',
  outfit_defaults text,
  clothing_tags text[] NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX characters_user ON characters (user_id);
CREATE INDEX characters_creator ON characters (creator_id);
CREATE INDEX characters_public ON characters (created_at DESC) WHERE is_public;
ALTER TABLE projects ADD FOREIGN KEY (character_id) REFERENCES characters ON DELETE SET NULL;

-- A scene of a project, as in the specification's time, or, without a project, a template that its later versions know.
CREATE TABLE scenes (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  project_id uuid REFERENCES projects ON DELETE CASCADE,
  scene_number int CHECK (scene_number > 0),
  description text NOT NULL,
  enhanced_prompt text,
  image_url text,
  approved boolean NOT NULL DEFAULT false,
  final_stitched_url text,
  creator_id uuid REFERENCES profiles ON DELETE CASCADE,
  name text CHECK (name <> ''),
  scene_prompt text,
  scene_starters text[] NOT NULL DEFAULT '{}',
  setting text,
  atmosphere jsonb,
  time_of_day text,
  content_rating text NOT NULL DEFAULT 'sfw' CHECK (content_rating IN ('sfw', 'nsfw')),
  tags text[] NOT NULL DEFAULT '{}',
  is_public boolean NOT NULL DEFAULT false,
  scene_focus text CHECK (scene_focus IN ('setting', 'character', 'interaction', 'atmosphere')),
  narrative_style text CHECK (narrative_style IN ('concise', 'detailed', 'atmospheric')),
  perspective_hint text CHECK (perspective_hint IN ('third_person', 'pov', 'observer')),
  max_words int CHECK (max_words BETWEEN 20 AND 200),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (project_id, scene_number),
  CONSTRAINT of_a_project_or_template CHECK (CASE WHEN project_id IS NULL THEN name IS NOT NULL AND scene_number IS NULL
                                                  ELSE scene_number IS NOT NULL END)
);
CREATE INDEX scenes_creator ON scenes (creator_id) WHERE creator_id IS NOT NULL;

CREATE TABLE character_scenes (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  character_id uuid REFERENCES characters ON DELETE CASCADE,  -- null: the installation's own
  conversation_id uuid,                       -- its key stands with the conversations
  image_url text,
  scene_prompt text NOT NULL,
  generation_metadata jsonb NOT NULL DEFAULT '{}',
  job_id uuid REFERENCES jobs ON DELETE SET NULL,  -- the original's key kept jobs from being deleted
  generation_mode text,
  previous_scene_id uuid REFERENCES character_scenes ON DELETE SET NULL,
  previous_scene_image_url text,
  priority int NOT NULL DEFAULT 0,
  scene_name text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX character_scenes_character ON character_scenes (character_id, created_at DESC);
CREATE INDEX character_scenes_conversation ON character_scenes (conversation_id) WHERE conversation_id IS NOT NULL;
CREATE INDEX character_scenes_job ON character_scenes (job_id) WHERE job_id IS NOT NULL;
CREATE INDEX character_scenes_previous ON character_scenes (previous_scene_id) WHERE previous_scene_id IS NOT NULL;

CREATE TABLE user_collections (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  name text NOT NULL CHECK (name <> ''),
  description text,
  asset_count int NOT NULL DEFAULT 0 CHECK (asset_count >= 0),  -- written by the trigger below alone
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX user_collections_user ON user_collections (user_id);
UPDATE user_library SET collection_id = NULL;  -- there was nothing that it could have named
ALTER TABLE user_library ADD FOREIGN KEY (collection_id) REFERENCES user_collections ON DELETE SET NULL;
CREATE INDEX user_library_collection ON user_library (collection_id) WHERE collection_id IS NOT NULL;

-- One more, one less: a count taken anew would miss what another transaction is adding at this moment.
CREATE FUNCTION ourvidz.count_collected() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE user_collections SET asset_count = asset_count - 1 WHERE id = OLD.collection_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE user_collections SET asset_count = asset_count + 1 WHERE id = NEW.collection_id;
  END IF;
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.count_collected() FROM PUBLIC;
CREATE TRIGGER user_library_collected AFTER INSERT OR DELETE OR UPDATE OF collection_id ON user_library
  FOR EACH ROW EXECUTE FUNCTION ourvidz.count_collected();

-- ------------------------------------------------------------------------------------------- what admins configure

CREATE TABLE api_providers (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name text NOT NULL UNIQUE CHECK (name <> ''),
  display_name text NOT NULL,
  base_url text,                              -- null: this installation itself
  docs_url text,
  auth_scheme text NOT NULL DEFAULT 'bearer',
  auth_header_name text NOT NULL DEFAULT 'Authorization',
  secret_name text,                           -- the name of an environment variable, never a secret
  rate_limits jsonb NOT NULL DEFAULT '{}',
  is_active boolean NOT NULL DEFAULT true,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_models (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  provider_id uuid NOT NULL REFERENCES api_providers ON DELETE CASCADE,
  model_key text NOT NULL UNIQUE CHECK (model_key <> ''),
  version text,
  display_name text NOT NULL,
  modality text NOT NULL CHECK (modality IN ('image', 'video', 'chat')),
  model_family text,
  endpoint_path text,
  input_defaults jsonb NOT NULL DEFAULT '{}',
  capabilities jsonb NOT NULL DEFAULT '{}',
  pricing jsonb NOT NULL DEFAULT '{}',
  output_format text,
  is_active boolean NOT NULL DEFAULT true,
  is_default boolean NOT NULL DEFAULT false,
  priority int NOT NULL DEFAULT 0,
  tasks text[] NOT NULL DEFAULT '{}' CHECK (check_valid_tasks(tasks)),
  default_for_tasks text[] NOT NULL DEFAULT '{}' CHECK (default_for_tasks <@ tasks),
  created_by uuid REFERENCES profiles ON DELETE SET NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_models_provider ON api_models (provider_id);
UPDATE jobs SET api_model_id = NULL WHERE api_model_id IS NOT NULL;  -- there was nothing that it could have named
ALTER TABLE jobs ADD FOREIGN KEY (api_model_id) REFERENCES api_models ON DELETE SET NULL;
CREATE INDEX jobs_api_model ON jobs (api_model_id) WHERE api_model_id IS NOT NULL;

-- What the views of presets, weights and tests over jobs are computed from; see 0017.
CREATE FUNCTION ourvidz.weights_hash(weights jsonb) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT encode(sha256(convert_to(weights::text, 'UTF8')), 'hex') $$;

CREATE TABLE ourvidz.enhancement_presets (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  preset_name varchar(100) NOT NULL UNIQUE CHECK (preset_name <> ''),
  preset_description text,
  enable_qwen boolean NOT NULL,
  enable_compel boolean NOT NULL,
  auto_enhancement boolean NOT NULL,
  compel_weights jsonb,
  qwen_settings jsonb,
  is_recommended boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT now(),
  created_by uuid REFERENCES profiles ON DELETE SET NULL
);

CREATE TABLE ourvidz.compel_configs (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  config_name varchar(100) NOT NULL CHECK (config_name <> ''),
  weights jsonb NOT NULL,
  config_hash varchar(64) NOT NULL UNIQUE GENERATED ALWAYS AS (ourvidz.weights_hash(weights)) STORED,
  is_active boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT now(),
  created_by uuid REFERENCES profiles ON DELETE SET NULL
);

CREATE TABLE enhanced_model_config (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  model_type varchar(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')),
  config_name varchar(100) NOT NULL,
  inference_steps int NOT NULL CHECK (inference_steps BETWEEN 1 AND 100),
  guidance_scale numeric(4, 1) NOT NULL CHECK (guidance_scale BETWEEN 0 AND 30),  -- (3,1) of the papers ends at 99.9 too
  resolution varchar(20),
  motion_bucket int,
  frame_count int,
  compel_quality_weight numeric(3, 1) DEFAULT 1.2,
  compel_detail_weight numeric(3, 1) DEFAULT 1.0,
  compel_nsfw_weight numeric(3, 1) DEFAULT 0.8,
  compel_style_weight numeric(3, 1) DEFAULT 1.1,
  qwen_max_time_ms int DEFAULT 15000,
  qwen_expansion_target int DEFAULT 2500,
  qwen_quality_focus varchar(20) DEFAULT 'high',
  qwen_auto_enable boolean DEFAULT true,
  enable_qwen boolean DEFAULT true,
  enable_compel boolean DEFAULT true,
  auto_enhancement boolean DEFAULT true,
  is_active boolean NOT NULL DEFAULT false,
  is_default boolean NOT NULL DEFAULT false,
  created_by uuid REFERENCES profiles ON DELETE SET NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (model_type, config_name)
);
CREATE UNIQUE INDEX enhanced_model_config_active ON enhanced_model_config (model_type) WHERE is_active;

-- The history of that table, by its trigger alone. What a change did to jobs is computed; see 0017.
CREATE TABLE ourvidz.config_changes (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  config_id uuid,                             -- no key: the history outlives the configuration
  model_type varchar(20) NOT NULL,
  config_name varchar(100) NOT NULL,
  old_values jsonb,
  new_values jsonb,
  changed_by uuid REFERENCES profiles ON DELETE SET NULL,
  changed_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX config_changes_model ON ourvidz.config_changes (model_type, changed_at);

CREATE FUNCTION ourvidz.keep_config() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
  before jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - 'updated_at' END;
  after jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - 'updated_at' END;
BEGIN
  IF before IS DISTINCT FROM after THEN
    INSERT INTO ourvidz.config_changes (config_id, model_type, config_name, old_values, new_values, changed_by, changed_at)
    VALUES (coalesce(after ->> 'id', before ->> 'id')::uuid, coalesce(after ->> 'model_type', before ->> 'model_type'),
            coalesce(after ->> 'config_name', before ->> 'config_name'), before, after,
            (SELECT id FROM profiles WHERE id = ourvidz.uid()), clock_timestamp());
  END IF;
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.keep_config() FROM PUBLIC;
CREATE TRIGGER enhanced_model_config_history AFTER INSERT OR UPDATE OR DELETE ON enhanced_model_config
  FOR EACH ROW EXECUTE FUNCTION ourvidz.keep_config();

CREATE TABLE ourvidz.prompt_ab_tests (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  test_name varchar(100) NOT NULL CHECK (test_name <> ''),
  test_series varchar(100) NOT NULL,
  baseline_config jsonb NOT NULL,
  enhanced_config jsonb NOT NULL,
  -- of the difference between the arms, 0 to 1: a test of statistics, computed where there is a library for it
  confidence_level numeric(5, 4) CHECK (confidence_level BETWEEN 0 AND 1),
  is_complete boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT now(),
  completed_at timestamptz,
  CONSTRAINT complete_has_time CHECK (is_complete = (completed_at IS NOT NULL))
);
UPDATE jobs SET prompt_test_id = NULL WHERE prompt_test_id IS NOT NULL;  -- there was nothing that it could have named
ALTER TABLE jobs ADD FOREIGN KEY (prompt_test_id) REFERENCES ourvidz.prompt_ab_tests ON DELETE SET NULL;
CREATE INDEX jobs_prompt_test ON jobs (prompt_test_id) WHERE prompt_test_id IS NOT NULL;
CREATE INDEX jobs_preset ON jobs ((test_metadata ->> 'preset')) WHERE test_metadata IS NOT NULL;

CREATE TABLE model_test_results (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid REFERENCES profiles ON DELETE SET NULL,
  model_type varchar(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN', 'LORA')),
  model_version varchar(50),
  prompt_text text NOT NULL,
  success boolean NOT NULL DEFAULT true,
  overall_quality int CHECK (overall_quality BETWEEN 0 AND 10),
  technical_quality int CHECK (technical_quality BETWEEN 0 AND 10),
  content_quality int CHECK (content_quality BETWEEN 0 AND 10),
  consistency int CHECK (consistency BETWEEN 0 AND 10),
  test_series varchar(100) NOT NULL,
  test_tier varchar(50) NOT NULL CHECK (test_tier IN ('artistic', 'explicit', 'unrestricted')),
  test_category varchar(100),
  test_metadata jsonb NOT NULL DEFAULT '{}',
  job_id uuid REFERENCES jobs ON DELETE SET NULL,
  image_id uuid,
  video_id uuid,
  generation_time_ms int CHECK (generation_time_ms >= 0),
  file_size_bytes bigint CHECK (file_size_bytes >= 0),
  notes text,
  enhancement_strategy varchar(50) CHECK (enhancement_strategy IN ('none', 'qwen', 'compel', 'hybrid')),
  original_prompt text,
  enhanced_prompt text,
  enhancement_time_ms int CHECK (enhancement_time_ms >= 0),
  quality_improvement numeric(4, 2),          -- the papers' (3,2) ends at 9.99
  compel_weights jsonb,
  qwen_expansion_percentage numeric(9, 2),    -- the papers' (5,2) ends below their own 3400 %
  baseline_quality numeric(4, 2) CHECK (baseline_quality BETWEEN 0 AND 10),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX model_test_results_user ON model_test_results (user_id);
CREATE INDEX model_test_results_job ON model_test_results (job_id) WHERE job_id IS NOT NULL;
CREATE INDEX model_test_results_weights ON model_test_results (ourvidz.weights_hash(compel_weights))
  WHERE compel_weights IS NOT NULL;

CREATE TABLE admin_development_progress (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  feature_name varchar(100) NOT NULL,
  feature_category varchar(50) NOT NULL,
  status varchar(20) NOT NULL CHECK (status IN ('not_started', 'in_progress', 'completed', 'blocked')),
  priority varchar(10) NOT NULL CHECK (priority IN ('P0', 'P1', 'P2')),
  assigned_to varchar(100),
  estimated_hours int,
  actual_hours int,
  start_date date,
  completion_date date,
  notes text,
  blockers text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);

-- -------------------------------------------------------------------------------------------------------- guards

DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['projects', 'characters', 'scenes', 'character_scenes', 'api_providers', 'api_models',
      'enhanced_model_config', 'model_test_results', 'admin_development_progress'] LOOP
    EXECUTE format('CREATE TRIGGER %I BEFORE UPDATE ON %I FOR EACH ROW EXECUTE FUNCTION ourvidz.touch()', t || '_touch', t);
  END LOOP;
  FOREACH t IN ARRAY ARRAY['projects', 'characters', 'scenes', 'character_scenes', 'user_collections', 'api_providers',
      'api_models', 'ourvidz.enhancement_presets', 'ourvidz.compel_configs', 'enhanced_model_config',
      'ourvidz.config_changes', 'ourvidz.prompt_ab_tests', 'model_test_results', 'admin_development_progress'] LOOP
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', t);
  END LOOP;

  -- what one user owns: read by the staff too, written by the owner and by admins
  FOREACH t IN ARRAY ARRAY['projects', 'user_collections'] LOOP
    EXECUTE format($f$
      CREATE POLICY own_or_staff ON %1$I FOR SELECT TO authenticated
        USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
      CREATE POLICY own_made ON %1$I FOR INSERT TO authenticated WITH CHECK (user_id = (SELECT ourvidz.uid()));
      CREATE POLICY own_changed ON %1$I FOR UPDATE TO authenticated
        USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));
      CREATE POLICY own_deleted ON %1$I FOR DELETE TO authenticated
        USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')))$f$, t);
  END LOOP;

  -- what admins alone see and write
  FOREACH t IN ARRAY ARRAY['prompt_templates', 'negative_prompts', 'system_config', 'ourvidz.enhancement_presets',
      'ourvidz.compel_configs', 'enhanced_model_config', 'ourvidz.prompt_ab_tests', 'model_test_results',
      'admin_development_progress'] LOOP
    EXECUTE format('CREATE POLICY admins ON %s TO authenticated USING ((SELECT has_role(ourvidz.uid(), ''admin'')))', t);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO authenticated', t);
  END LOOP;
  FOREACH t IN ARRAY ARRAY['prompt_templates', 'negative_prompts', 'system_config', 'api_providers', 'api_models',
      'ourvidz.enhancement_presets', 'ourvidz.compel_configs', 'enhanced_model_config', 'ourvidz.prompt_ab_tests'] LOOP
    EXECUTE format('CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON %s
                    FOR EACH ROW EXECUTE FUNCTION ourvidz.audit_change()', t);
  END LOOP;
END $$;
REVOKE INSERT, DELETE ON system_config FROM authenticated;  -- it is one row

CREATE POLICY admins ON ourvidz.config_changes FOR SELECT TO authenticated
  USING ((SELECT has_role(ourvidz.uid(), 'admin')));
GRANT SELECT ON ourvidz.config_changes TO authenticated;

-- A public character is for everybody who is logged in, and for adults only where it says so.
CREATE POLICY own_public_or_staff ON characters FOR SELECT TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all())
         OR is_public AND (content_rating = 'sfw' OR (SELECT ourvidz.is_adult())));
CREATE POLICY own_made ON characters FOR INSERT TO authenticated
  WITH CHECK (user_id = (SELECT ourvidz.uid()) OR user_id IS NULL AND (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY own_changed ON characters FOR UPDATE TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY own_deleted ON characters FOR DELETE TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));

-- Whether the caller may write to a character or project: asked of rows that hang on it. It reads them under the
-- caller's own row-level security.
CREATE FUNCTION ourvidz.owns_character(asked uuid) RETURNS boolean
LANGUAGE sql STABLE AS $$ SELECT EXISTS (SELECT FROM public.characters WHERE id = asked AND user_id = ourvidz.uid()) $$;
CREATE FUNCTION ourvidz.owns_project(asked uuid) RETURNS boolean
LANGUAGE sql STABLE AS $$ SELECT EXISTS (SELECT FROM public.projects WHERE id = asked AND user_id = ourvidz.uid()) $$;

CREATE POLICY own_or_staff ON character_scenes FOR SELECT TO authenticated
  USING (ourvidz.owns_character(character_id) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_admin ON character_scenes TO authenticated
  USING (ourvidz.owns_character(character_id) OR (SELECT has_role(ourvidz.uid(), 'admin')));

CREATE POLICY own_public_or_staff ON scenes FOR SELECT TO authenticated
  USING (ourvidz.owns_project(project_id) OR creator_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all())
         OR is_public AND project_id IS NULL AND (content_rating = 'sfw' OR (SELECT ourvidz.is_adult())));
CREATE POLICY own_made ON scenes FOR INSERT TO authenticated
  WITH CHECK (CASE WHEN project_id IS NULL THEN creator_id = (SELECT ourvidz.uid())
                   ELSE ourvidz.owns_project(project_id) AND coalesce(creator_id = (SELECT ourvidz.uid()), true) END);
CREATE POLICY own_changed ON scenes FOR UPDATE TO authenticated
  USING (CASE WHEN project_id IS NULL THEN creator_id = (SELECT ourvidz.uid()) ELSE ourvidz.owns_project(project_id) END
         OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY own_deleted ON scenes FOR DELETE TO authenticated
  USING (CASE WHEN project_id IS NULL THEN creator_id = (SELECT ourvidz.uid()) ELSE ourvidz.owns_project(project_id) END
         OR (SELECT has_role(ourvidz.uid(), 'admin')));

-- What is offered is for everybody who is logged in; the rest, and every change, for admins.
CREATE POLICY offered ON api_providers FOR SELECT TO authenticated
  USING ((is_active AND (SELECT ourvidz.uid()) IS NOT NULL) OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY offered ON api_models FOR SELECT TO authenticated
  USING ((is_active AND (SELECT ourvidz.uid()) IS NOT NULL) OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY admins ON api_providers TO authenticated USING ((SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY admins ON api_models TO authenticated USING ((SELECT has_role(ourvidz.uid(), 'admin')));
GRANT SELECT, INSERT, UPDATE, DELETE ON api_models TO authenticated;
GRANT INSERT, UPDATE, DELETE ON api_providers TO authenticated;

-- Columns that users may not write are left out: keys, owners, counters, what only the installation knows. Which secret
-- a provider takes is told to nobody.
DO $$
DECLARE
  rule record;
  listed text;
BEGIN
  FOR rule IN SELECT * FROM (VALUES
    ('projects', 'INSERT', '{created_at,updated_at}'::text[]),
    ('projects', 'UPDATE', '{id,user_id,created_at,updated_at}'),
    ('user_collections', 'INSERT', '{asset_count,created_at}'),
    ('user_collections', 'UPDATE', '{id,user_id,asset_count,created_at}'),
    ('characters', 'INSERT', '{likes_count,interaction_count,portrait_count,scene_count,created_at,updated_at}'),
    ('characters', 'UPDATE', '{id,user_id,creator_id,likes_count,interaction_count,portrait_count,scene_count,created_at,updated_at}'),
    ('scenes', 'INSERT', '{created_at,updated_at}'),
    ('scenes', 'UPDATE', '{id,project_id,creator_id,created_at,updated_at}'),
    ('character_scenes', 'INSERT', '{job_id,generation_metadata,created_at,updated_at}'),
    ('character_scenes', 'UPDATE', '{id,character_id,conversation_id,job_id,generation_metadata,created_at,updated_at}'),
    ('api_providers', 'SELECT', '{secret_name}')
  ) AS rules (tab, right_, without) LOOP
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO listed FROM pg_attribute
    WHERE attrelid = rule.tab::regclass AND attnum > 0 AND NOT attisdropped AND attname <> ALL (rule.without);
    EXECUTE format('GRANT %s (%s) ON %I TO authenticated', rule.right_, listed, rule.tab);
  END LOOP;
END $$;
GRANT SELECT, DELETE ON projects, user_collections, characters, scenes, character_scenes TO authenticated;

-- Replicas and upkeep read what is offered, and what a chat is about.
GRANT SELECT ON characters, api_providers, api_models TO ourvidz_worker;
CREATE POLICY worker ON characters FOR SELECT TO ourvidz_worker USING (true);
CREATE POLICY worker ON api_providers FOR SELECT TO ourvidz_worker USING (true);
CREATE POLICY worker ON api_models FOR SELECT TO ourvidz_worker USING (true);
