// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"io"
	"maps"
	"path"
	"slices"
	"time"
)

// tree is one layer: names without a leading slash, parents included.
type tree struct{ entries map[string]*entry }

type entry struct {
	kind     byte
	mode     int64
	uid, gid int
	target   string
	body     []byte
}

func newTree() *tree { return &tree{entries: make(map[string]*entry)} }

// add puts an entry in place of an older one of that name and makes the
// directories above it.
func (t *tree) add(name string, e *entry) {
	t.entries[name] = e
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if t.entries[dir] == nil {
			t.entries[dir] = &entry{kind: tar.TypeDir, mode: 0o755}
		}
	}
}

func (t *tree) dir(name string, mode int64) { t.add(name, &entry{kind: tar.TypeDir, mode: mode}) }

func (t *tree) link(name, target string) {
	t.add(name, &entry{kind: tar.TypeSymlink, mode: 0o777, target: target})
}

func (t *tree) file(name string, mode int64, body string) {
	t.add(name, &entry{kind: tar.TypeReg, mode: mode, body: []byte(body)})
}

func (t *tree) chown(name string, uid, gid int) {
	t.entries[name].uid, t.entries[name].gid = uid, gid
}

// writeTar writes the entries sorted by name, so parents come first, all of
// the year 1970.
func (t *tree) writeTar(w io.Writer) error {
	archive := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(t.entries)) {
		e := t.entries[name]
		header := &tar.Header{
			Typeflag: e.kind, Name: name, Linkname: e.target, Mode: e.mode, Size: int64(len(e.body)),
			Uid: e.uid, Gid: e.gid, ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		}
		if e.kind == tar.TypeDir {
			header.Name += "/"
		}
		if err := archive.WriteHeader(header); err != nil {
			return err
		}
		if _, err := archive.Write(e.body); err != nil {
			return err
		}
	}
	return archive.Close()
}
