-- The tables as the paper on the portal creates them. Corrected: users are `profiles`, since `auth.users` is there on
-- Supabase only. They are made in a schema of their own, to compare names and columns with what we have.

-- name: enhanced_prompt_tests
CREATE TABLE enhanced_prompt_tests (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), original_prompt TEXT NOT NULL, enhanced_prompt TEXT NOT NULL,
  enhancement_strategy VARCHAR(50) NOT NULL,
  model_type VARCHAR(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')), job_type VARCHAR(50) NOT NULL,
  original_length INTEGER NOT NULL, enhanced_length INTEGER NOT NULL, expansion_percentage DECIMAL(5,2) NOT NULL,
  enhancement_time_ms INTEGER, compel_weights JSONB, weight_config_hash VARCHAR(64),
  baseline_quality DECIMAL(3,2), enhanced_quality DECIMAL(3,2), quality_improvement DECIMAL(3,2),
  consistency_score DECIMAL(3,2), generation_time_ms INTEGER, file_size_bytes INTEGER, success BOOLEAN NOT NULL,
  error_message TEXT, test_series VARCHAR(100), test_tier VARCHAR(20), notes TEXT,
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), tested_by UUID REFERENCES profiles(id)
);

-- name: compel_configs
CREATE TABLE compel_configs (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), config_name VARCHAR(100) NOT NULL, weights JSONB NOT NULL,
  config_hash VARCHAR(64) UNIQUE NOT NULL, total_tests INTEGER DEFAULT 0, avg_quality DECIMAL(3,2),
  avg_consistency DECIMAL(3,2), is_active BOOLEAN DEFAULT false,
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), created_by UUID REFERENCES profiles(id)
);

-- name: prompt_ab_tests
CREATE TABLE prompt_ab_tests (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), test_name VARCHAR(100) NOT NULL,
  test_series VARCHAR(100) NOT NULL, baseline_config JSONB NOT NULL, enhanced_config JSONB NOT NULL,
  total_participants INTEGER DEFAULT 0, baseline_avg_quality DECIMAL(3,2), enhanced_avg_quality DECIMAL(3,2),
  quality_improvement DECIMAL(3,2), confidence_level DECIMAL(3,2), is_complete BOOLEAN DEFAULT false,
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), completed_at TIMESTAMP WITH TIME ZONE
);

-- name: live_prompt_metrics
CREATE TABLE live_prompt_metrics (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), timestamp TIMESTAMP WITH TIME ZONE DEFAULT NOW(),
  total_jobs INTEGER NOT NULL, qwen_enhanced_jobs INTEGER NOT NULL, compel_enhanced_jobs INTEGER NOT NULL,
  hybrid_enhanced_jobs INTEGER NOT NULL, no_enhancement_jobs INTEGER NOT NULL, avg_enhancement_time_ms INTEGER,
  avg_quality_with_enhancement DECIMAL(3,2), avg_quality_without_enhancement DECIMAL(3,2),
  avg_quality_gain DECIMAL(3,2), qwen_success_rate DECIMAL(5,2), compel_success_rate DECIMAL(5,2),
  hybrid_success_rate DECIMAL(5,2), no_enhancement_success_rate DECIMAL(5,2), sdxl_enhancement_usage DECIMAL(5,2),
  wan_enhancement_usage DECIMAL(5,2), period_type VARCHAR(20) NOT NULL
);

-- name: live_job_tracking
CREATE TABLE live_job_tracking (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), job_id UUID NOT NULL, user_id UUID REFERENCES profiles(id),
  job_type VARCHAR(50) NOT NULL, model_type VARCHAR(20) NOT NULL, enhancement_strategy VARCHAR(50),
  original_prompt TEXT, enhanced_prompt TEXT, enhancement_time_ms INTEGER, baseline_quality DECIMAL(3,2),
  final_quality DECIMAL(3,2), quality_improvement DECIMAL(3,2), status VARCHAR(20) NOT NULL,
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), updated_at TIMESTAMP WITH TIME ZONE DEFAULT NOW()
);

-- name: user_enhancement_adoption
CREATE TABLE user_enhancement_adoption (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), user_id UUID REFERENCES profiles(id), date DATE NOT NULL,
  total_jobs INTEGER DEFAULT 0, jobs_with_enhancement INTEGER DEFAULT 0, enhancement_adoption_rate DECIMAL(5,2),
  qwen_usage_count INTEGER DEFAULT 0, compel_usage_count INTEGER DEFAULT 0, hybrid_usage_count INTEGER DEFAULT 0,
  no_enhancement_count INTEGER DEFAULT 0, avg_quality_with_enhancement DECIMAL(3,2),
  avg_quality_without_enhancement DECIMAL(3,2), avg_quality_improvement DECIMAL(3,2),
  first_enhancement_date TIMESTAMP WITH TIME ZONE, enhancement_learning_rate DECIMAL(5,2), UNIQUE(user_id, date)
);

-- name: enhanced_model_config
CREATE TABLE enhanced_model_config (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  model_type VARCHAR(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')), config_name VARCHAR(100) NOT NULL,
  inference_steps INTEGER NOT NULL, guidance_scale DECIMAL(3,1) NOT NULL, resolution VARCHAR(20),
  motion_bucket INTEGER, frame_count INTEGER, compel_quality_weight DECIMAL(3,1) DEFAULT 1.2,
  compel_detail_weight DECIMAL(3,1) DEFAULT 1.0, compel_nsfw_weight DECIMAL(3,1) DEFAULT 0.8,
  compel_style_weight DECIMAL(3,1) DEFAULT 1.1, qwen_max_time_ms INTEGER DEFAULT 15000,
  qwen_expansion_target INTEGER DEFAULT 2500, qwen_quality_focus VARCHAR(20) DEFAULT 'high',
  qwen_auto_enable BOOLEAN DEFAULT true, enable_qwen BOOLEAN DEFAULT true, enable_compel BOOLEAN DEFAULT true,
  auto_enhancement BOOLEAN DEFAULT true, is_active BOOLEAN DEFAULT false, is_default BOOLEAN DEFAULT false,
  created_by UUID REFERENCES profiles(id), created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(),
  updated_at TIMESTAMP WITH TIME ZONE DEFAULT NOW()
);

-- name: enhancement_presets
CREATE TABLE enhancement_presets (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), preset_name VARCHAR(100) NOT NULL, preset_description TEXT,
  enable_qwen BOOLEAN NOT NULL, enable_compel BOOLEAN NOT NULL, auto_enhancement BOOLEAN NOT NULL,
  compel_weights JSONB, qwen_settings JSONB, usage_count INTEGER DEFAULT 0, avg_quality_with_preset DECIMAL(3,2),
  is_recommended BOOLEAN DEFAULT false, created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(),
  created_by UUID REFERENCES profiles(id)
);

-- name: config_change_history
CREATE TABLE config_change_history (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), config_id UUID REFERENCES enhanced_model_config(id),
  model_type VARCHAR(20) NOT NULL, config_name VARCHAR(100) NOT NULL, old_values JSONB, new_values JSONB,
  change_summary TEXT, jobs_affected INTEGER DEFAULT 0, quality_impact DECIMAL(3,2),
  performance_impact DECIMAL(3,2), changed_by UUID REFERENCES profiles(id),
  changed_at TIMESTAMP WITH TIME ZONE DEFAULT NOW()
);

-- name: admin_development_progress
CREATE TABLE admin_development_progress (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), feature_name VARCHAR(100) NOT NULL,
  feature_category VARCHAR(50) NOT NULL,
  status VARCHAR(20) NOT NULL CHECK (status IN ('not_started', 'in_progress', 'completed', 'blocked')),
  priority VARCHAR(10) NOT NULL CHECK (priority IN ('P0', 'P1', 'P2')), assigned_to VARCHAR(100),
  estimated_hours INTEGER, actual_hours INTEGER, start_date DATE, completion_date DATE, notes TEXT, blockers TEXT,
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), updated_at TIMESTAMP WITH TIME ZONE DEFAULT NOW()
);

-- name: prompt_test_results
CREATE TABLE prompt_test_results (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(), prompt_text TEXT NOT NULL,
  model_type VARCHAR(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')), prompt_category VARCHAR(50),
  quality_rating INTEGER CHECK (quality_rating BETWEEN 1 AND 5), generation_time_ms INTEGER,
  success BOOLEAN NOT NULL, error_message TEXT, notes TEXT, tested_by UUID REFERENCES profiles(id),
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW()
);

-- name: model_performance_logs
CREATE TABLE model_performance_logs (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  model_type VARCHAR(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')), date DATE NOT NULL,
  total_generations INTEGER DEFAULT 0, successful_generations INTEGER DEFAULT 0,
  failed_generations INTEGER DEFAULT 0, avg_generation_time_ms INTEGER, avg_quality_rating DECIMAL(3,2),
  total_processing_time_ms INTEGER, created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(),
  updated_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), UNIQUE(model_type, date)
);

-- name: model_config_history
CREATE TABLE model_config_history (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  model_type VARCHAR(20) NOT NULL CHECK (model_type IN ('SDXL', 'WAN')), config_name VARCHAR(100) NOT NULL,
  config_data JSONB NOT NULL, is_active BOOLEAN DEFAULT false, created_by UUID REFERENCES profiles(id),
  created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW(), notes TEXT
);
