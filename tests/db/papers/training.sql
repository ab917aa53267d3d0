-- The statements of the audit of trainings. Corrected: the schema `lora`; an id that is looked up where the paper has a
-- blank; the user of a role, which the paper leaves blank too.

-- name: run
INSERT INTO lora.training_runs (run_name, caption_version, base_model, network_dim, network_alpha, overall_verdict,
                                quality_score, is_production)
VALUES ('CAPTION_FIX_Epoch8_Production', 'caption_fix_v1', 'runwayml/stable-diffusion-v1-5', 128, 128, 'good', 8.5, true)
RETURNING id;

-- name: epoch
INSERT INTO lora.epoch_results (training_run_id, epoch_number, checkpoint_path, checkpoint_file_size_mb,
                                visual_quality_score, style_match_score, prompt_adherence_score, verdict,
                                production_ready, notes, quantitative_metrics)
VALUES ((SELECT id FROM lora.training_runs WHERE run_name = 'CAPTION_FIX_Epoch8_Production'), 8,
        'lora_checkpoints/caption_fix/caption_fix_epoch8.safetensors', 36, 9, 8, 8, 'good', true,
        'Currently used in production. Cleanest results with 216.6 avg colors.',
        '{"avg_colors": 216.6, "style": "clean_pixel_art", "background_accuracy": "high"}'::jsonb);

-- name: settings
-- Corrected: the rows are there, closed.
INSERT INTO lora.app_settings (setting_key, setting_value) VALUES
    ('public_viewing_enabled', 'true'),
    ('public_editing_enabled', 'false')
ON CONFLICT (setting_key) DO UPDATE SET setting_value = excluded.setting_value;

-- name: role
INSERT INTO lora.user_roles (user_id, email, role)
SELECT id, 'admin@example.com', 'admin' FROM profiles WHERE username = 'alice';
