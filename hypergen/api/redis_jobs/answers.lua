-- The commands of redis_answers.py, each atomic. KEYS[1] is the answer of one key, ARGV[1] the prefix of all keys,
-- ARGV[2] the command, ARGV[3] who claims the key.
local prefix, command, owner, answer = ARGV[1], ARGV[2], ARGV[3], KEYS[1]
local answers = prefix .. 'answers' -- "answer bytes" -> when it was kept
local totals = prefix .. 'answer_totals'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local commands = {}

local function is_ours() return redis.call('HGET', answer, 'owner') == owner end

-- fingerprint, seconds. Returns {} if the key was free and is ours now, else what is known about its request.
function commands.claim()
    if redis.call('EXISTS', answer) == 1 then return redis.call('HGETALL', answer) end
    redis.call('HSET', answer, 'owner', owner, 'fingerprint', ARGV[4])
    redis.call('EXPIRE', answer, ARGV[5])
    return {}
end

-- seconds
function commands.keep()
    if is_ours() and redis.call('HEXISTS', answer, 'status') == 0 then redis.call('EXPIRE', answer, ARGV[4]) end
end

function commands.free()
    if is_ours() and redis.call('HEXISTS', answer, 'status') == 0 then redis.call('DEL', answer) end
end

-- seconds, max_bytes, bytes, then pairs of a field and its value. Returns {} if it is kept, else the answer that
-- came first, while this replica seemed dead.
function commands.put()
    if redis.call('HEXISTS', answer, 'status') == 1 then return redis.call('HGETALL', answer) end
    local lifetime_s, max_bytes, bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
    redis.call('HSET', answer, 'owner', owner, unpack(ARGV, 7))
    redis.call('EXPIRE', answer, math.ceil(lifetime_s))
    redis.call('ZADD', answers, now, answer .. ' ' .. string.format('%d', bytes))
    redis.call('INCRBY', totals, bytes)
    local oldest = redis.call('ZRANGE', answers, 0, 0, 'WITHSCORES')
    while oldest[1] and (tonumber(oldest[2]) < now - lifetime_s or tonumber(redis.call('GET', totals)) > max_bytes) do
        local key, size = string.match(oldest[1], '^(%S+) (%d+)$')
        redis.call('ZREM', answers, oldest[1])
        if tonumber(oldest[2]) >= now - lifetime_s then redis.call('UNLINK', key) end -- else it has expired
        redis.call('DECRBY', totals, size)
        oldest = redis.call('ZRANGE', answers, 0, 0, 'WITHSCORES')
    end
    return {}
end

return commands[command]()
