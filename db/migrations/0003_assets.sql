-- What jobs produced. Only (bucket, key) is stored; URLs are signed when they are read.

CREATE TABLE workspace_assets (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
  asset_index int NOT NULL DEFAULT 0 CHECK (asset_index >= 0),
  attempt int NOT NULL,
  asset_type text NOT NULL CHECK (asset_type IN ('image', 'video')),
  temp_storage_path text NOT NULL,            -- key in bucket workspace-temp
  thumbnail_path text,
  mime_type text NOT NULL,
  file_size_bytes bigint NOT NULL CHECK (file_size_bytes > 0),
  width int CHECK (width > 0),
  height int CHECK (height > 0),
  frames int CHECK (frames > 0),
  fps numeric(8, 3) CHECK (fps > 0),
  duration_seconds numeric(10, 3),
  generation_seed bigint,                     -- null where a provider did not tell it
  original_prompt text NOT NULL,
  model_used text NOT NULL,
  generation_settings jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz NOT NULL DEFAULT now() + interval '7 days',
  UNIQUE (job_id, asset_index)
);
CREATE INDEX workspace_assets_user ON workspace_assets (user_id, created_at DESC);
CREATE INDEX workspace_assets_expiry ON workspace_assets (expires_at);

CREATE TABLE user_library (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  source_asset_id uuid UNIQUE,                -- the workspace asset that was saved: saving twice is one row
  asset_type text NOT NULL CHECK (asset_type IN ('image', 'video')),
  storage_path text NOT NULL,                 -- key in bucket user-library
  thumbnail_path text,
  file_size_bytes bigint NOT NULL CHECK (file_size_bytes > 0),
  mime_type text NOT NULL,
  duration_seconds numeric(10, 3),
  width int,
  height int,
  original_prompt text NOT NULL,
  model_used text NOT NULL,
  generation_seed bigint,
  generation_metadata jsonb NOT NULL DEFAULT '{}',
  collection_id uuid,
  custom_title text,
  tags text[] NOT NULL DEFAULT '{}',
  is_favorite boolean NOT NULL DEFAULT false,
  visibility text NOT NULL DEFAULT 'private' CHECK (visibility IN ('private', 'unlisted', 'public')),
  content_category text NOT NULL DEFAULT 'general',
  roleplay_metadata jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TRIGGER user_library_touch BEFORE UPDATE ON user_library FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();
CREATE INDEX user_library_user ON user_library (user_id, created_at DESC);
