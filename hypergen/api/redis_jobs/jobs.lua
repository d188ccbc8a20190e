-- The commands of job_queue.py. Redis runs each call alone, so a job changes from one state to the next at once.
--
-- ARGV[1] is the prefix of all keys, ARGV[2] the command; what follows is named where a command reads it.
local prefix, command = ARGV[1], ARGV[2]
local queue, group = prefix .. 'queue', 'replicas'
local waiting = prefix .. 'waiting'       -- job -> its order, for positions
local unfinished = prefix .. 'unfinished' -- "job input_bytes api_key" -> its deadline
local ended = prefix .. 'ended'           -- "job image_bytes" -> its end
local totals = prefix .. 'totals'         -- input_bytes, image_bytes, and api_key:NAME -> unfinished jobs
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6

local function record_of(job) return prefix .. 'job:' .. job end
local function images_of(job) return prefix .. 'images:' .. job end

local function has_ended(state)
    return state == 'succeeded' or state == 'failed' or state == 'cancelled'
end

local function total(name) return tonumber(redis.call('HGET', totals, name) or 0) end

local function add(name, amount)
    if amount == 0 then return end -- it may be -0, which is no integer for Redis
    if redis.call('HINCRBY', totals, name, amount) <= 0 then redis.call('HDEL', totals, name) end
end

local function remove_ended(member)
    local job, bytes = string.match(member, '^(%S+) (%d+)$')
    redis.call('ZREM', ended, member)
    redis.call('UNLINK', record_of(job), images_of(job))
    add('image_bytes', -tonumber(bytes))
end

local function oldest_ended() return redis.call('ZRANGE', ended, 0, 0, 'WITHSCORES') end

-- Removes ended jobs that are older than their lifetime, and the oldest while images take too much memory.
local function trim(lifetime_s, max_image_bytes)
    local oldest = oldest_ended()
    while oldest[1] and (tonumber(oldest[2]) < now - lifetime_s
        or (total('image_bytes') > max_image_bytes and redis.call('ZCARD', ended) > 1)) do
        remove_ended(oldest[1])
        oldest = oldest_ended()
    end
end

local function remove_unfinished(job, member)
    if redis.call('ZREM', unfinished, member) == 1 then
        local bytes, key = string.match(member, '^%S+ (%d+) (.*)$')
        add('input_bytes', -tonumber(bytes))
        add('api_key:' .. key, -1)
    end
    redis.call('ZREM', waiting, job)
end

-- The first end counts: later ones change nothing. `files` are pairs of an image's index and its file.
local function finish(job, state, error, images, lifetime_s, max_image_bytes, files)
    local record = record_of(job)
    local old = redis.call('HMGET', record, 'state', 'entry', 'member')
    if not old[1] then return 'unknown' end
    if has_ended(old[1]) then return 'ended' end
    redis.call('XACK', queue, group, old[2])
    redis.call('XDEL', queue, old[2])
    remove_unfinished(job, old[3])
    redis.call('HDEL', record, 'image', 'mask', 'control', 'ends_at')
    redis.call('HSET', record, 'state', state, 'error', error, 'images', images)
    local bytes = 0
    for i = 1, #files, 2 do
        redis.call('HSET', images_of(job), files[i], files[i + 1])
        bytes = bytes + #files[i + 1]
    end
    redis.call('EXPIRE', record, math.ceil(lifetime_s))
    redis.call('EXPIRE', images_of(job), math.ceil(lifetime_s))
    redis.call('ZADD', ended, now, job .. ' ' .. string.format('%d', bytes))
    add('image_bytes', bytes)
    trim(lifetime_s, max_image_bytes)
    return 'done'
end

local commands = {}

-- job, member, deadline, lifetime_s, max_jobs, max_image_bytes, max_input_bytes, input_bytes, key, max_requests,
-- images_per_minute, n, timeout (packed), then pairs of a field and its value. Empty limits: none.
-- Returns {outcome, number}.
function commands.submit()
    local job, member, deadline = ARGV[3], ARGV[4], tonumber(ARGV[5])
    local lifetime_s, max_jobs, max_image_bytes = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
    local max_input_bytes, input_bytes, key = tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11]
    local max_requests, per_minute, n = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
    if redis.call('EXISTS', record_of(job)) == 1 then -- the client's connection was lost after the first call
        return {'done', redis.call('ZRANK', waiting, job) or 0}
    end
    trim(lifetime_s, max_image_bytes)
    -- No replica has run these in time, nor found that they are late.
    for _, late in ipairs(redis.call('ZRANGEBYSCORE', unfinished, '-inf', now - 60, 'LIMIT', 0, 100)) do
        local other = string.match(late, '^%S+')
        if finish(other, 'failed', ARGV[15], '', lifetime_s, max_image_bytes, {}) ~= 'done' then
            remove_unfinished(other, late)
        end
    end
    if max_requests and total('api_key:' .. key) >= max_requests then return {'key_full', 0} end
    local rate = prefix .. 'rate:' .. key
    if per_minute then
        redis.call('ZREMRANGEBYSCORE', rate, '-inf', now - 60)
        local images, admitted = n, redis.call('ZRANGE', rate, 0, -1, 'WITHSCORES')
        for i = 1, #admitted, 2 do images = images + tonumber(string.match(admitted[i], '%d+$')) end
        for i = 1, #admitted, 2 do
            if images <= per_minute then break end
            images = images - tonumber(string.match(admitted[i], '%d+$'))
            if images <= per_minute then
                return {'key_rate', math.max(1, math.ceil(tonumber(admitted[i + 1]) + 60 - now))}
            end
        end
    end
    local held = total('input_bytes')
    if held > 0 and input_bytes > 0 and held + input_bytes > max_input_bytes then return {'inputs_full', 0} end
    if redis.call('ZCARD', unfinished) >= max_jobs then return {'full', 0} end
    while redis.call('ZCARD', unfinished) + redis.call('ZCARD', ended) >= max_jobs do
        remove_ended(oldest_ended()[1])
    end
    if per_minute then
        redis.call('ZADD', rate, now, job .. ' ' .. n)
        redis.call('EXPIRE', rate, 60)
    end
    local entry = redis.call('XADD', queue, '*', 'job', job)
    local record = record_of(job)
    redis.call('HSET', record, 'state', 'queued', 'entry', entry, 'member', member, 'order', now,
        unpack(ARGV, 16))
    redis.call('EXPIRE', record, math.ceil(deadline - now + lifetime_s))
    redis.call('ZADD', unfinished, deadline, member)
    redis.call('ZADD', waiting, now, job)
    add('input_bytes', input_bytes)
    add('api_key:' .. key, 1)
    return {'done', redis.call('ZRANK', waiting, job)}
end

-- job, entry, replica. Returns the record; empty if the job has ended.
function commands.take()
    local job, entry, record = ARGV[3], ARGV[4], record_of(ARGV[3])
    local state = redis.call('HGET', record, 'state')
    if not state or has_ended(state) then
        redis.call('XACK', queue, group, entry)
        redis.call('XDEL', queue, entry)
        return {}
    end
    redis.call('HINCRBY', record, 'deliveries', 1)
    redis.call('HSET', record, 'state', 'queued', 'replica', ARGV[5])
    redis.call('HDEL', record, 'step', 'steps', 'ends_at')
    redis.call('ZADD', waiting, redis.call('HGET', record, 'order'), job)
    return redis.call('HGETALL', record)
end

-- replica, then for each of its jobs: job, entry, state, step, steps, ends_at. An empty value is not known yet.
-- Returns the jobs that are no longer this replica's: cancelled, or taken over while it seemed dead.
function commands.beat()
    local lost = {}
    for i = 4, #ARGV, 6 do
        local job, record = ARGV[i], record_of(ARGV[i])
        local old = redis.call('HMGET', record, 'state', 'replica')
        if not old[1] or has_ended(old[1]) or old[2] ~= ARGV[3] then
            table.insert(lost, job)
        else
            redis.call('XCLAIM', queue, group, ARGV[3], 0, ARGV[i + 1], 'IDLE', 0, 'JUSTID')
            redis.call('HSET', record, 'state', ARGV[i + 2])
            if ARGV[i + 2] == 'running' then redis.call('ZREM', waiting, job) end
            for offset, field in ipairs({'step', 'steps', 'ends_at'}) do
                local value = ARGV[i + 2 + offset]
                if value ~= '' then redis.call('HSET', record, field, value) end
            end
        end
    end
    return lost
end

-- job, entry, replica. Another replica may take the job at once; this delivery does not count.
function commands.release()
    local record = record_of(ARGV[3])
    local old = redis.call('HMGET', record, 'state', 'replica', 'order')
    if not old[1] or has_ended(old[1]) or old[2] ~= ARGV[5] then return 'ended' end
    redis.call('HINCRBY', record, 'deliveries', -1)
    redis.call('HSET', record, 'state', 'queued', 'replica', '')
    redis.call('HDEL', record, 'step', 'steps', 'ends_at')
    redis.call('ZADD', waiting, old[3], ARGV[3])
    redis.call('XCLAIM', queue, group, ARGV[5], 0, ARGV[4], 'IDLE', 86400000, 'JUSTID')
    return 'done'
end

-- job, state, error (packed), images, lifetime_s, max_image_bytes, steps, then pairs of an index and a file.
function commands.finish()
    local outcome = finish(ARGV[3], ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), {unpack(ARGV, 10)})
    if outcome == 'done' and ARGV[9] ~= '' then
        redis.call('HSET', record_of(ARGV[3]), 'step', ARGV[9], 'steps', ARGV[9])
    end
    return outcome
end

-- job. Returns its record without the input images, and its position, -1 if it does not wait.
function commands.get()
    local fields = {}
    for _, name in ipairs({'state', 'endpoint', 'request', 'created', 'step', 'steps', 'ends_at', 'error', 'images'}) do
        local value = redis.call('HGET', record_of(ARGV[3]), name)
        if value then
            table.insert(fields, name)
            table.insert(fields, value)
        end
    end
    return {fields, redis.call('ZRANK', waiting, ARGV[3]) or -1}
end

-- silent_s. Removes replicas that were silent for longer and have no jobs left to take over.
function commands.forget_replicas()
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', queue, group)) do
        local fields = {}
        for i = 1, #consumer, 2 do fields[consumer[i]] = consumer[i + 1] end
        if fields.pending == 0 and fields.idle > tonumber(ARGV[3]) * 1000 then
            redis.call('XGROUP', 'DELCONSUMER', queue, group, fields.name)
        end
    end
end

return commands[command]()
