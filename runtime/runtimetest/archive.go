// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
)

type descriptor struct {
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// readArchive answers the images of an OCI archive, plain or gzip, all of whose
// blobs are there and whole.
func readArchive(r io.Reader) ([]runtime.Image, error) {
	br := bufio.NewReader(r)
	var in io.Reader = br
	if head, err := br.Peek(2); err == nil && bytes.Equal(head, []byte{0x1f, 0x8b}) {
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, err
		}
		in = zr
	}
	files := map[string][]byte{}
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		files[h.Name] = b
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, err
	}
	blob := func(d descriptor, into any) error {
		b, ok := files["blobs/sha256/"+d.Digest[min(len("sha256:"), len(d.Digest)):]]
		if sum := sha256.Sum256(b); !ok || "sha256:"+hex.EncodeToString(sum[:]) != d.Digest {
			return fmt.Errorf("blob %s is missing or damaged", d.Digest)
		}
		if into == nil {
			return nil
		}
		return json.Unmarshal(b, into)
	}
	var index struct {
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	if len(index.Manifests) == 0 {
		return nil, errors.New("no image in it")
	}
	var out []runtime.Image
	for _, m := range index.Manifests {
		var manifest struct {
			Config descriptor   `json:"config"`
			Layers []descriptor `json:"layers"`
		}
		if err := blob(m, &manifest); err != nil {
			return nil, err
		}
		img := runtime.Image{Name: m.Annotations["io.containerd.image.name"], Digest: m.Digest, Created: time.Now()}
		if img.Name == "" {
			img.Name = m.Digest
		}
		for _, d := range append(manifest.Layers, manifest.Config) {
			if err := blob(d, nil); err != nil {
				return nil, err
			}
			img.SizeBytes += d.Size
		}
		out = append(out, img)
	}
	return out, nil
}
