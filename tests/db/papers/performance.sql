-- The queries of the paper on model_performance_logs.

-- name: by_model_type
-- Was wrong: the paper stores upper case by its CHECK and asks for lower case.
SELECT * FROM model_performance_logs
WHERE model_type = upper('sdxl')
ORDER BY date DESC
LIMIT 30;

-- name: success_rates
-- Was wrong: there is no round(double precision, int); and a division by zero.
SELECT
    model_type,
    SUM(total_generations) as total_generations,
    SUM(successful_generations) as successful_generations,
    SUM(failed_generations) as failed_generations,
    ROUND(
        (SUM(successful_generations)::numeric / NULLIF(SUM(total_generations), 0)) * 100, 2
    ) as success_rate_percentage,
    AVG(avg_quality_rating) as avg_quality
FROM model_performance_logs
WHERE date >= NOW() - INTERVAL '30 days'
GROUP BY model_type
ORDER BY success_rate_percentage DESC;

-- name: trends
SELECT date, model_type, total_generations, successful_generations, avg_generation_time_ms, avg_quality_rating
FROM model_performance_logs
WHERE date >= NOW() - INTERVAL '30 days'
ORDER BY date DESC, model_type;

-- name: comparison
-- Was wrong: a division by zero.
SELECT
    model_type,
    AVG(avg_generation_time_ms) as avg_time_ms,
    AVG(avg_quality_rating) as avg_quality,
    AVG((successful_generations::float / NULLIF(total_generations, 0)) * 100) as avg_success_rate
FROM model_performance_logs
WHERE date >= NOW() - INTERVAL '7 days'
GROUP BY model_type
ORDER BY avg_quality DESC;

-- name: anomalies
-- Was wrong: as in success_rates.
SELECT
    date,
    model_type,
    total_generations,
    failed_generations,
    ROUND((failed_generations::numeric / NULLIF(total_generations, 0)) * 100, 2) as failure_rate_percentage
FROM model_performance_logs
WHERE (failed_generations::numeric / NULLIF(total_generations, 0)) > 0.1
  AND date >= NOW() - INTERVAL '7 days'
ORDER BY failure_rate_percentage DESC;

-- name: quality_trends
SELECT
    DATE_TRUNC('week', date) as week,
    model_type,
    AVG(avg_quality_rating) as weekly_avg_quality,
    COUNT(*) as data_points
FROM model_performance_logs
WHERE date >= NOW() - INTERVAL '12 weeks'
GROUP BY DATE_TRUNC('week', date), model_type
ORDER BY week DESC, weekly_avg_quality DESC;

-- name: processing_times
SELECT
    model_type,
    AVG(avg_generation_time_ms) as avg_time_ms,
    MIN(avg_generation_time_ms) as min_time_ms,
    MAX(avg_generation_time_ms) as max_time_ms,
    STDDEV(avg_generation_time_ms) as time_stddev
FROM model_performance_logs
WHERE avg_generation_time_ms IS NOT NULL
  AND date >= NOW() - INTERVAL '30 days'
GROUP BY model_type
ORDER BY avg_time_ms;

-- name: daily_summary
SELECT
    date,
    COUNT(DISTINCT model_type) as active_models,
    SUM(total_generations) as total_generations,
    SUM(successful_generations) as total_successful,
    AVG(avg_quality_rating) as overall_avg_quality
FROM model_performance_logs
WHERE date >= NOW() - INTERVAL '7 days'
GROUP BY date
ORDER BY date DESC;
