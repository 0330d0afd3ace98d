// SPDX-License-Identifier: Apache-2.0

package store

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/bulkheadhq/bulkhead/agent/budget"
	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
)

// version of the schema that this program writes.
const version = 2

// migrations[i] turns version i+1 into i+2, inside Open's transaction.
var migrations = []func(*bolt.Tx) error{
	func(tx *bolt.Tx) error { // 1 had no budgets
		_, err := tx.CreateBucket(bucketBudgets)
		return err
	},
}

var (
	bucketMeta      = []byte("meta")
	bucketSandboxes = []byte("sandboxes")
	bucketNames     = []byte("names")
	bucketSlots     = []byte("slots")
	bucketMarks     = []byte("marks")
	bucketBudgets   = []byte("budgets")

	keyVersion = []byte("version")
	keyNodeID  = []byte("node_id")
	keyCreated = []byte("created")
)

// ErrLocked says: another process has the file open.
var ErrLocked = errors.New("is in use by another agent")

// ErrNotFound says: there is no record of that id.
var ErrNotFound = errors.New("no record")

// ErrNoSlot says: every slot is held.
var ErrNoSlot = errors.New("no slot is free")

// NameTakenError says which sandbox has a name.
type NameTakenError struct {
	Tenant, Name, ID string
}

func (e *NameTakenError) Error() string {
	return fmt.Sprintf("tenant %s already has a sandbox named %s (%s): choose another name, or delete it with `bulkhead rm %s`", e.Tenant, e.Name, e.ID, e.ID)
}

// Store is an open file. Its methods may be called by many goroutines.
type Store struct {
	db     *bolt.DB
	path   string
	nodeID string
}

// Open opens or makes the file, and migrates it. Errors: ErrLocked, a later
// schema, a damaged file.
func Open(path string) (*Store, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 100 * time.Millisecond, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("state %s: %w: one agent per state directory", path, ErrLocked)
	case err != nil:
		return nil, fmt.Errorf("open state %s: %w", path, err)
	}
	s := &Store{db: db, path: path}
	if err := db.Update(s.prepare); err != nil {
		return nil, errors.Join(fmt.Errorf("state %s: %w", path, err), db.Close())
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// prepare makes a new file's buckets or brings an old one's to this version.
func (s *Store) prepare(tx *bolt.Tx) error {
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		for _, name := range [][]byte{bucketMeta, bucketSandboxes, bucketNames, bucketSlots, bucketMarks, bucketBudgets} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		s.nodeID = newUUID()
		meta = tx.Bucket(bucketMeta)
		return errors.Join(
			meta.Put(keyNodeID, []byte(s.nodeID)),
			meta.Put(keyCreated, []byte(time.Now().UTC().Format(time.RFC3339))),
			meta.Put(keyVersion, binary.BigEndian.AppendUint32(nil, version)),
		)
	}
	v := meta.Get(keyVersion)
	if len(v) != 4 {
		return errors.New("has no schema version: it is not one of ours, or damaged")
	}
	have := binary.BigEndian.Uint32(v)
	if have > version {
		return fmt.Errorf("has schema %d, this agent knows up to %d: install the agent that wrote it, or a later one", have, version)
	}
	for ; have < version; have++ {
		if err := migrations[have-1](tx); err != nil {
			return fmt.Errorf("migrate schema %d: %w", have, err)
		}
	}
	if err := meta.Put(keyVersion, binary.BigEndian.AppendUint32(nil, version)); err != nil {
		return err
	}
	s.nodeID = string(meta.Get(keyNodeID))
	return nil
}

// newUUID is a random UUID, version 4 (RFC 9562).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}

// NodeID is the node's UUID.
func (s *Store) NodeID() string { return s.nodeID }

// Close lets go of the file.
func (s *Store) Close() error { return s.db.Close() }

func (s *Store) update(what, id string, f func(*bolt.Tx) error) error {
	if err := s.db.Update(f); err != nil {
		return fmt.Errorf("%s %s: %w", what, id, err)
	}
	return nil
}

func nameKey(rec sandbox.Record) []byte {
	return []byte(string(rec.Spec.Tenant) + "\x00" + rec.Spec.Name)
}

func slotKey(slot uint32) []byte { return binary.BigEndian.AppendUint32(nil, slot) }

func put(tx *bolt.Tx, rec sandbox.Record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketSandboxes).Put([]byte(rec.ID), data)
}

// Reserve writes a new record and claims its name and the lowest free slot
// between 1 and maxSlot that is not taken, which it answers in the record.
// Errors: *NameTakenError, ErrNoSlot.
func (s *Store) Reserve(rec sandbox.Record, maxSlot uint32, taken map[uint32]string) (sandbox.Record, error) {
	err := s.db.Update(func(tx *bolt.Tx) error {
		if tx.Bucket(bucketSandboxes).Get([]byte(rec.ID)) != nil {
			return fmt.Errorf("id %s is in use", rec.ID)
		}
		names := tx.Bucket(bucketNames)
		if id := names.Get(nameKey(rec)); id != nil {
			return &NameTakenError{Tenant: string(rec.Spec.Tenant), Name: rec.Spec.Name, ID: string(id)}
		}
		slot, err := freeSlot(tx, maxSlot, taken)
		if err != nil {
			return err
		}
		rec.Slot = slot
		return errors.Join(
			names.Put(nameKey(rec), []byte(rec.ID)),
			tx.Bucket(bucketSlots).Put(slotKey(slot), []byte(rec.ID)),
			put(tx, rec),
		)
	})
	if err != nil {
		return sandbox.Record{}, fmt.Errorf("reserve: %w", err)
	}
	return rec, nil
}

// freeSlot walks the slots that are held, which are in order.
func freeSlot(tx *bolt.Tx, maxSlot uint32, taken map[uint32]string) (uint32, error) {
	c := tx.Bucket(bucketSlots).Cursor()
	held, _ := c.First()
	for slot := uint32(1); slot <= maxSlot; slot++ {
		if held != nil && binary.BigEndian.Uint32(held) == slot {
			held, _ = c.Next()
			continue
		}
		if _, is := taken[slot]; !is {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%w: %d are held", ErrNoSlot, maxSlot)
}

// Put replaces a record that Reserve has made.
func (s *Store) Put(rec sandbox.Record) error {
	return s.update("write record of sandbox", rec.ID, func(tx *bolt.Tx) error {
		if tx.Bucket(bucketSandboxes).Get([]byte(rec.ID)) == nil {
			return ErrNotFound
		}
		return put(tx, rec)
	})
}

// PutAll replaces records that Reserve has made, all in one transaction.
func (s *Store) PutAll(recs []sandbox.Record) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, rec := range recs {
			if tx.Bucket(bucketSandboxes).Get([]byte(rec.ID)) == nil {
				return fmt.Errorf("sandbox %s: %w", rec.ID, ErrNotFound)
			}
			if err := put(tx, rec); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write records of %d sandboxes: %w", len(recs), err)
	}
	return nil
}

// Load answers every record, in order of id.
func (s *Store) Load() ([]sandbox.Record, error) {
	var recs []sandbox.Record
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketSandboxes).ForEach(func(id, data []byte) error {
			var rec sandbox.Record
			if err := json.Unmarshal(data, &rec); err != nil {
				return fmt.Errorf("record of sandbox %s: %w", id, err)
			}
			if rec.ID != string(id) || !rec.State.Valid() {
				return fmt.Errorf("record of sandbox %s: names %q in state %q", id, rec.ID, rec.State)
			}
			recs = append(recs, rec)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", s.path, err)
	}
	return recs, nil
}

// Release frees the slot of a sandbox that is Stopped. Nil if it has none, or
// was deleted already.
func (s *Store) Release(id string) error {
	held := false
	err := s.db.View(func(tx *bolt.Tx) (err error) {
		_, held, err = holds(tx, id)
		return err
	})
	if err == nil && held {
		err = s.db.Update(func(tx *bolt.Tx) error { return release(tx, id) })
	}
	if err != nil {
		return fmt.Errorf("release slot of sandbox %s: %w", id, err)
	}
	return nil
}

func release(tx *bolt.Tx, id string) error {
	slot, held, err := holds(tx, id)
	if err != nil || !held {
		return err
	}
	return tx.Bucket(bucketSlots).Delete(slotKey(slot))
}

// holds answers the slot of a sandbox and whether the sandbox still holds it.
func holds(tx *bolt.Tx, id string) (slot uint32, held bool, err error) {
	rec, err := get(tx, id)
	if errors.Is(err, ErrNotFound) {
		return 0, false, nil
	}
	return rec.Slot, err == nil && string(tx.Bucket(bucketSlots).Get(slotKey(rec.Slot))) == id, err
}

func get(tx *bolt.Tx, id string) (sandbox.Record, error) {
	data := tx.Bucket(bucketSandboxes).Get([]byte(id))
	if data == nil {
		return sandbox.Record{}, ErrNotFound
	}
	var rec sandbox.Record
	err := json.Unmarshal(data, &rec)
	return rec, err
}

// Delete forgets a sandbox: record, name, mark, and slot if it still has one.
// Nil if there is no record.
func (s *Store) Delete(id string) error {
	return s.update("delete record of sandbox", id, func(tx *bolt.Tx) error {
		rec, err := get(tx, id)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return errors.Join(
			release(tx, id),
			tx.Bucket(bucketNames).Delete(nameKey(rec)),
			tx.Bucket(bucketMarks).Delete([]byte(id)),
			tx.Bucket(bucketSandboxes).Delete([]byte(id)),
		)
	})
}

// PutMarks writes how far sandboxes are metered, all in one transaction.
func (s *Store) PutMarks(marks map[string]meter.Mark) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketMarks)
		for id, m := range marks {
			data, err := json.Marshal(m)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(id), data); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %d usage marks: %w", len(marks), err)
	}
	return nil
}

// Marks answers every mark by sandbox id.
func (s *Store) Marks() (map[string]meter.Mark, error) {
	marks := map[string]meter.Mark{}
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMarks).ForEach(func(id, data []byte) error {
			var m meter.Mark
			if err := json.Unmarshal(data, &m); err != nil {
				return fmt.Errorf("usage mark of sandbox %s: %w", id, err)
			}
			marks[string(id)] = m
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", s.path, err)
	}
	return marks, nil
}

// PutBudgets writes what was spent of budgets and takes some out, all in one
// transaction.
func (s *Store) PutBudgets(put map[string]budget.Entry, drop []string) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketBudgets)
		for key, e := range put {
			data, err := json.Marshal(e)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(key), data); err != nil {
				return err
			}
		}
		for _, key := range drop {
			if err := b.Delete([]byte(key)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %d budgets: %w", len(put)+len(drop), err)
	}
	return nil
}

// Budgets answers what was spent of every budget, by key.
func (s *Store) Budgets() (map[string]budget.Entry, error) {
	out := map[string]budget.Entry{}
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketBudgets).ForEach(func(key, data []byte) error {
			var e budget.Entry
			if err := json.Unmarshal(data, &e); err != nil {
				return fmt.Errorf("budget %s: %w", key, err)
			}
			out[string(key)] = e
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", s.path, err)
	}
	return out, nil
}
