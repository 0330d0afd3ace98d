// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// cpioFile is an entry of the guest's initial RAM disk.
type cpioFile struct {
	name string
	mode uint32 // with the file type bits
	body []byte
	// rdev of a device node
	major, minor uint32
}

const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeChar = 0o020000
)

// writeCpio writes an archive in the "newc" format, the only one that the
// kernel unpacks: a header of 110 ASCII digits, the name, the body, each padded
// to four bytes.
func writeCpio(w io.Writer, files []cpioFile) error {
	for i, f := range append(files, cpioFile{name: "TRAILER!!!"}) {
		header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			i+1, f.mode, 0, 0, 1, 0, len(f.body), 0, 0, f.major, f.minor, len(f.name)+1, 0, f.name)
		if _, err := io.WriteString(w, pad(header)); err != nil {
			return err
		}
		if _, err := w.Write(f.body); err != nil {
			return err
		}
		if _, err := w.Write(make([]byte, padding(len(f.body)))); err != nil {
			return err
		}
	}
	return nil
}

func padding(n int) int { return (4 - n%4) % 4 }

func pad(s string) string { return s + "\x00\x00\x00"[:padding(len(s))] }

// writeInitrd writes an initial RAM disk whose /init is this program. It holds
// the plan and the modules of a directory.
func writeInitrd(file, self, early string, plan []byte) error {
	init, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	files := []cpioFile{
		{name: "dev", mode: typeDir | 0o755},
		{name: "dev/console", mode: typeChar | 0o600, major: 5, minor: 1},
		{name: "init", mode: typeFile | 0o755, body: init},
		{name: "plan.json", mode: typeFile | 0o644, body: plan},
		{name: "early", mode: typeDir | 0o755},
	}
	modules, err := os.ReadDir(early)
	if err != nil {
		return err
	}
	for _, m := range modules {
		body, err := os.ReadFile(filepath.Join(early, m.Name()))
		if err != nil {
			return err
		}
		files = append(files, cpioFile{name: "early/" + m.Name(), mode: typeFile | 0o644, body: body})
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	err = writeCpio(f, files)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
