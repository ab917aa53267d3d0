-- name: seed_preset(preset_name, preset_description, enable_qwen, enable_compel, auto_enhancement, compel_weights, qwen_settings, is_recommended)!
-- A preset of the product, unless the operator has one of that name already.
INSERT INTO ourvidz.enhancement_presets (preset_name, preset_description, enable_qwen, enable_compel, auto_enhancement,
                                         compel_weights, qwen_settings, is_recommended)
VALUES (:preset_name, :preset_description, :enable_qwen, :enable_compel, :auto_enhancement, :compel_weights, :qwen_settings,
        :is_recommended)
ON CONFLICT (preset_name) DO NOTHING;

-- name: seed_provider(name, display_name, base_url, docs_url, auth_scheme, secret_name, is_active, output_hosts)!
INSERT INTO api_providers (name, display_name, base_url, docs_url, auth_scheme, secret_name, is_active,
                           output_hosts)
VALUES (:name, :display_name, :base_url, :docs_url, :auth_scheme, :secret_name, :is_active, :output_hosts)
ON CONFLICT (name) DO NOTHING;

-- name: seed_model(provider, model_key, display_name, modality, model_family, endpoint_path, output_format, is_default, tasks, default_for_tasks)!
INSERT INTO api_models (provider_id, model_key, display_name, modality, model_family, endpoint_path, output_format,
                        is_default, tasks, default_for_tasks)
SELECT id, :model_key, :display_name, :modality, :model_family, :endpoint_path, :output_format, :is_default, :tasks,
       :default_for_tasks
FROM api_providers WHERE name = :provider
ON CONFLICT (model_key) DO NOTHING;
