-- What the papers change in the schema. Each runs in a transaction that is taken back.

-- name: jobs_columns
-- Runs as it is and changes nothing: the columns are there, wider where the paper's own examples do not fit.
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS enhancement_strategy VARCHAR(50);
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS original_prompt TEXT;
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS enhanced_prompt TEXT;
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS enhancement_time_ms INTEGER;
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS quality_rating DECIMAL(3,2);
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS quality_improvement DECIMAL(3,2);
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS compel_weights JSONB;
ALTER TABLE jobs ADD COLUMN IF NOT EXISTS qwen_expansion_percentage DECIMAL(5,2);

-- name: row_level_security
-- Corrected: what is a view here takes no such setting; the table below it does.
ALTER TABLE admin_development_progress ENABLE ROW LEVEL SECURITY;
ALTER TABLE model_test_results ENABLE ROW LEVEL SECURITY;         -- prompt_test_results, enhanced_prompt_tests
ALTER TABLE ourvidz.past_days ENABLE ROW LEVEL SECURITY;          -- model_performance_logs
ALTER TABLE ourvidz.config_changes ENABLE ROW LEVEL SECURITY;     -- model_config_history, config_change_history
ALTER TABLE ourvidz.compel_configs ENABLE ROW LEVEL SECURITY;
ALTER TABLE ourvidz.prompt_ab_tests ENABLE ROW LEVEL SECURITY;
ALTER TABLE enhanced_model_config ENABLE ROW LEVEL SECURITY;
ALTER TABLE ourvidz.enhancement_presets ENABLE ROW LEVEL SECURITY;

-- name: policies
-- Corrected: the caller is ourvidz.uid(), which reads the claims as auth.uid() does on Supabase; tables as above; and
-- has_role instead of a sub-select under the policies of user_roles.
CREATE POLICY "Admin access to development progress" ON admin_development_progress
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to prompt test results" ON model_test_results
    FOR ALL USING (EXISTS (SELECT 1 FROM user_roles WHERE user_id = ourvidz.uid() AND role = 'admin'));
CREATE POLICY "Admin access to model performance logs" ON ourvidz.past_days
    FOR ALL TO public USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to model config history" ON ourvidz.config_changes
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to enhanced prompt tests" ON model_test_results
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to compel configs" ON ourvidz.compel_configs
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to prompt ab tests" ON ourvidz.prompt_ab_tests
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to enhanced model config" ON enhanced_model_config
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to enhancement presets" ON ourvidz.enhancement_presets
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));
CREATE POLICY "Admin access to config change history" ON ourvidz.config_changes
    FOR ALL USING (has_role(ourvidz.uid(), 'admin'::app_role));

-- name: performance_indexes
-- Corrected: the logs are a view; the sums of days that are gone are what an index can stand on. Means are no columns.
CREATE INDEX idx_model_performance_logs_model_date ON ourvidz.past_days (model_type, date DESC);
CREATE INDEX idx_model_performance_logs_date ON ourvidz.past_days (date DESC);
CREATE INDEX idx_model_performance_logs_quality ON ourvidz.past_days ((rating / NULLIF(rated, 0)) DESC);
CREATE INDEX idx_model_performance_logs_time ON ourvidz.past_days ((time_ms / NULLIF(timed, 0)));
