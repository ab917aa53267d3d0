-- The tables as the audit of trainings creates them. Corrected: users are `profiles`.

-- name: user_roles
CREATE TABLE user_roles (
  id SERIAL PRIMARY KEY, user_id UUID REFERENCES profiles(id) ON DELETE CASCADE, email TEXT NOT NULL,
  role TEXT NOT NULL CHECK (role IN ('admin', 'viewer')), created_at TIMESTAMP DEFAULT NOW(), UNIQUE(user_id)
);

-- name: app_settings
CREATE TABLE app_settings (
  id SERIAL PRIMARY KEY, setting_key TEXT NOT NULL UNIQUE, setting_value TEXT NOT NULL,
  updated_by UUID REFERENCES profiles(id), updated_at TIMESTAMP DEFAULT NOW()
);

-- name: user_generations
CREATE TABLE user_generations (
  id SERIAL PRIMARY KEY, user_id UUID REFERENCES profiles(id), session_id TEXT, uploaded_image_hash TEXT,
  auto_detected_features JSONB, alacarte_traits_selected TEXT[], epoch_used INTEGER, prompt_used TEXT,
  generation_successful BOOLEAN, output_512_path TEXT, output_24_path TEXT,
  user_rating INTEGER CHECK (user_rating >= 1 AND user_rating <= 5), user_feedback TEXT,
  created_at TIMESTAMP DEFAULT NOW()
);

-- name: trait_detection_accuracy
CREATE TABLE trait_detection_accuracy (
  id SERIAL PRIMARY KEY, generation_id INTEGER REFERENCES user_generations(id), trait_type TEXT,
  detected_value TEXT, user_confirmed BOOLEAN, user_corrected_value TEXT, created_at TIMESTAMP DEFAULT NOW()
);

-- name: alacarte_trait_usage
CREATE TABLE alacarte_trait_usage (
  id SERIAL PRIMARY KEY, trait_id TEXT, trait_category TEXT, times_selected INTEGER DEFAULT 0,
  times_rated_positive INTEGER DEFAULT 0, times_rated_negative INTEGER DEFAULT 0, avg_user_rating DECIMAL(3,2),
  last_selected_at TIMESTAMP, created_at TIMESTAMP DEFAULT NOW()
);
