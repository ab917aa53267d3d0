-- Prompt templates, negative prompts and the operator's settings. Rows are seeded from configs/ at start.

CREATE TABLE prompt_templates (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  enhancer_model varchar NOT NULL,
  use_case varchar NOT NULL,
  content_mode varchar NOT NULL DEFAULT 'sfw' CHECK (content_mode IN ('sfw', 'nsfw')),
  template_name varchar NOT NULL,
  system_prompt text NOT NULL CHECK (system_prompt <> ''),
  token_limit int NOT NULL CHECK (token_limit > 0),
  job_type text CHECK (job_type IN ('chat', 'image', 'video')),
  target_model text CHECK (target_model IN ('sdxl', 'wan')),
  quality text CHECK (quality IN ('fast', 'high')),
  is_active boolean NOT NULL DEFAULT true,
  version int NOT NULL DEFAULT 1 CHECK (version > 0),
  metadata jsonb NOT NULL DEFAULT '{}',
  description text,
  comment text,
  provider text NOT NULL DEFAULT 'local',
  created_by uuid REFERENCES profiles ON DELETE SET NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (enhancer_model, use_case, content_mode, template_name)
);
CREATE TRIGGER prompt_templates_touch BEFORE UPDATE ON prompt_templates FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();

CREATE TABLE negative_prompts (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name text NOT NULL CHECK (name <> ''),
  model_type varchar,                         -- null in these three: fits every value
  content_mode varchar CHECK (content_mode IN ('sfw', 'nsfw')),
  generation_mode text CHECK (generation_mode IN ('txt2img', 'i2i')),
  negative_prompt text NOT NULL,              -- may be empty: a named group that an operator fills
  priority int NOT NULL DEFAULT 1,            -- higher first
  is_active boolean NOT NULL DEFAULT true,
  metadata jsonb NOT NULL DEFAULT '{}',       -- triggers, take, required
  description text,
  created_by uuid REFERENCES profiles ON DELETE SET NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE NULLS NOT DISTINCT (model_type, content_mode, generation_mode, name)
);
CREATE TRIGGER negative_prompts_touch BEFORE UPDATE ON negative_prompts FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();

CREATE TABLE system_config (
  id bigint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
  config jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TRIGGER system_config_touch BEFORE UPDATE ON system_config FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();
INSERT INTO system_config (config) VALUES ('{}');
